"""The journal: what a kill leaves behind is read back, and what is not its own is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headscope.interp.errors import HeadscopeError
from headscope.interp.runs.journal import Journal

CONFIG: dict[str, Any] = {"method": "sinks", "seed": 0, "trials": [{"length": 64}, {"length": 128}]}


def written(path: Path, count: int = 3) -> Journal:
    journal = Journal(path, CONFIG)
    for trial in range(count):
        journal.add(trial, {"score": trial / 3, "text": "é\n"})
    return journal


def test_finished_trials_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.jsonl"
    journal = written(path)
    again = Journal(path, CONFIG)
    assert again.entries == journal.entries and 2 in again and 3 not in again
    again.add(3, {"score": None})
    assert Journal(path, CONFIG).entries[3] == {"score": None}


def test_trials_may_finish_in_any_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl", CONFIG)
    for trial in (5, 0, 3):
        journal.add(trial, {"score": trial})
    assert Journal(tmp_path / "run.jsonl", CONFIG).entries == {5: {"score": 5}, 0: {"score": 0}, 3: {"score": 3}}


def test_settings_are_compared_as_json(tmp_path: Path) -> None:
    Journal(tmp_path / "run.jsonl", {"lengths": (1, 2), "path": Path("a")})
    Journal(tmp_path / "run.jsonl", {"path": "a", "lengths": [1, 2]})


def test_a_run_that_finished_nothing_gives_way_to_another(tmp_path: Path) -> None:
    """Settings that failed at once are corrected in the same folder; one finished trial holds it."""
    path = tmp_path / "run.jsonl"
    Journal(path, CONFIG)
    other = Journal(path, {"method": "induction"})
    other.add(0, {"score": 1.0})
    assert Journal(path, {"method": "induction"}).entries == {0: {"score": 1.0}}
    with pytest.raises(HeadscopeError, match="other settings"):
        Journal(path, CONFIG)


def test_in_memory_only() -> None:
    journal = Journal(None, CONFIG)
    journal.add(0, {"score": 1.0})
    assert 0 in journal and 1 not in journal


def test_every_cut_of_the_last_line_is_survived(tmp_path: Path) -> None:
    """Wherever a kill cuts the last line, its trial alone is lost, and the file is whole after the next trial."""
    path = tmp_path / "run.jsonl"
    written(path)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        journal = Journal(path, CONFIG)
        assert sorted(journal.entries) == [0, 1]
        journal.add(2, {"score": 2 / 3, "text": "é\n"})
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"not json\n",
        b"[]\n",
        b"3\n",
        b"{}\n",
        b'{"headscope_run": 3}\n',
        b'{"headscope_run": [1, 2]}\n',
        b'{"headscope_run": {}}',  # no end of line: a header is written whole or not at all
        b"\xff\xfe\x00\n",
        b"PAR1\x00\x00",
    ],
)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(HeadscopeError, match="is not a run of headscope; choose another output folder"):
        Journal(path, CONFIG)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"garbage\n", b"[]\n", b'{"trial": 0}\n', b'{"trial": "x", "result": {}}\n', b"\n"])
def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "run.jsonl"
    written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(HeadscopeError, match="line 3 of .* is damaged; delete that line"):
        Journal(path, CONFIG)


def test_a_changed_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    written(path)
    path.write_bytes(path.read_bytes().replace(b"0.333", b"0.433"))
    with pytest.raises(HeadscopeError, match="line 3 of .* is damaged"):
        Journal(path, CONFIG)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"trials": []}, "trials"),
        ({"method": "x", "seed": 2}, "method, seed"),
        ({"new": 1}, "new"),
    ],
)
def test_other_settings_are_named_and_the_file_left_alone(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "run.jsonl"
    written(path)
    before = path.read_bytes() + b'{"torn'
    path.write_bytes(before)
    with pytest.raises(HeadscopeError, match=rf"other settings \({named}\); choose another output folder, or delete"):
        Journal(path, CONFIG | change)
    assert path.read_bytes() == before


def test_a_result_that_cannot_be_written_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    journal = Journal(path, CONFIG)
    with pytest.raises(TypeError):
        journal.add(0, {"score": np.zeros(3)})
    assert 0 not in journal and Journal(path, CONFIG).entries == {}


CHILD = """
import sys, time
from headscope.interp.runs.journal import Journal
journal = Journal(sys.argv[1], {"seed": 0})
for trial in range(10**6):
    if trial not in journal:
        journal.add(trial, {"score": trial * 0.5, "text": "x" * 2000})
"""


def test_kill_minus_nine_loses_no_finished_trial(tmp_path: Path) -> None:
    """A process that writes trials as fast as it can is killed, three times over; then every trial is there, once."""
    path = tmp_path / "run.jsonl"
    finished = 0
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)])
        deadline = time.monotonic() + 60
        size = path.stat().st_size if path.exists() else 0
        while (path.stat().st_size if path.exists() else 0) < size + 20_000:
            assert child.poll() is None and time.monotonic() < deadline, "the writer did not get going"
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        complete = path.read_bytes().count(b"\n") - 1
        journal = Journal(path, {"seed": 0})
        assert sorted(journal.entries) == list(range(complete)) and complete > finished
        assert all(result == {"score": t * 0.5, "text": "x" * 2000} for t, result in journal.entries.items())
        finished = complete
    assert [json.loads(line)["trial"] for line in path.read_text().splitlines()[1:]] == list(range(finished))
