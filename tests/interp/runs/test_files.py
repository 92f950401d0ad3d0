"""Atomic writes: a reader sees the old file or the new one, whatever happens in between."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from headscope.interp.errors import HeadscopeError
from headscope.interp.runs import files
from headscope.interp.runs.files import locked, write_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_atomically(path, b"first")
    write_atomically(str(path), b"second, longer")
    assert path.read_bytes() == b"second, longer"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(files.os, step, fail)
    line = HeadscopeError if isinstance(error, OSError) else type(error)
    with pytest.raises(line, match=r"cannot write .*a.json \(No space left" if line is HeadscopeError else ""):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_data_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name, function in real.items():
        monkeypatch.setattr(files.os, name, lambda *a, n=name, f=function: (steps.append(n), f(*a))[1])
    write_atomically(tmp_path / "a", b"data")
    assert steps == ["fsync", "replace"]


def test_others_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        try:
            write_atomically(tmp_path / "a", b"data")
            assert os.umask(mask) == mask, "the umask was changed"
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_the_umask_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks sets another one meanwhile, for the files of every thread."""
    monkeypatch.setattr(files.os, "umask", lambda _: pytest.fail("the umask of the process was changed"))
    write_atomically(tmp_path / "a", b"data")


def test_a_folder_of_that_name_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "a" / "inside").mkdir(parents=True)
    with pytest.raises(HeadscopeError, match="cannot write"):
        write_atomically(tmp_path / "a", b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


CHILD = """
import sys
from headscope.interp.runs.files import write_atomically
write_atomically(sys.argv[1], b"0" * 400_000)
print("ready", flush=True)
for i in range(10**6):
    write_atomically(sys.argv[1], str(i % 10).encode() * 400_000)
"""


def test_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    """Killed at any time, the file is one of the whole versions (a leftover temporary file is hidden)."""
    path = tmp_path / "a"
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        for _ in range(5):
            data = path.read_bytes()
            assert len(data) == 400_000 and len(set(data)) == 1
        child.kill()
        child.wait()
        child.stdout.close()
        data = path.read_bytes()
        assert len(data) == 400_000 and len(set(data)) == 1
    assert all(p.name == "a" or p.name.startswith(".a.") for p in tmp_path.iterdir())


HOLDER = """
import sys, time
from headscope.interp.runs.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_keeps_others_out_until_its_process_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "run" / "trials.jsonl"
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"held\n"
    with pytest.raises(HeadscopeError, match="another process is writing"), locked(path):
        raise AssertionError("two processes in one run")
    with locked(path.with_name("other.jsonl")):  # another file of the same folder
        pass
    child.kill()  # without a chance to clean up
    child.wait()
    child.stdout.close()
    with locked(path):
        with pytest.raises(HeadscopeError, match="another process"), locked(path):
            raise AssertionError("twice in one process")
    assert list(path.parent.iterdir()) == []  # no lock file stays


def test_a_lock_is_released_by_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "a"):
        raise KeyboardInterrupt
    with locked(tmp_path / "a"), locked(None), locked(None):
        pass


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """Below a file there can be no folder, whoever asks (a read-only disk looks the same)."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HeadscopeError, match=r"cannot write .* \(.*\); make room there, or choose another output"):
        write_atomically(tmp_path / "file" / "a", b"data")
    with pytest.raises(HeadscopeError, match="cannot write"), locked(tmp_path / "file" / "a"):
        raise AssertionError("locked")


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np, xarray as xr
from headscope.interp.errors import HeadscopeError
from headscope.interp.records.record import save_record
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
out, rng = Path(sys.argv[1]), np.random.default_rng(0)
journal = Journal(out / "run.jsonl", {})
values = (("example", "layer", "head", "query"), rng.random((1, 2, 4, 500)))
record = xr.Dataset({"entropy": values}, {"example": [0], "layer": [0, 1], "head": range(4), "query": range(500)})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (
    lambda: HeadScores("m", rng.random((50, 4, 4))).save(out),
    lambda: journal.add(0, {"text": "x" * 9000}),
    lambda: save_record(record, out / "record"),
):
    try:
        write()
    except HeadscopeError as error:
        print(error)
"""


def test_files_that_the_system_does_not_let_grow_are_one_line_each(tmp_path: Path) -> None:
    """A real refusal of the system (a limit of 4 KiB a file) for results, journals and records."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done.stderr
    assert all(line.startswith("cannot write ") and "File too large" in line for line in lines)
    assert not list(tmp_path.glob("record/part-*")) and not (tmp_path / "m.json").exists()
