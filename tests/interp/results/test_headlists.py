"""Head lists in the form of their publishers: samples written by hand, read, written again, and refused when broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from headscope.interp.cli.intervene import head_set
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headlists import (
    CONFIG,
    GATES,
    from_duo_attention,
    from_retrieval_head,
    to_duo_attention,
    to_retrieval_head,
)
from headscope.interp.results.minference import MISSING, HeadPatterns, SparsePattern
from headscope.interp.results.scores import HeadScores

# Written as the authors' files are: integers among the floats, one line; %.18e and tabs; indented JSON.
RETRIEVAL = '{"0-0": [0, 0.10344827586206896, 0], "0-1": [0, 0, 0], "1-0": [1.0, 0.5, 0], "1-1": [0.25, 0.25, 0.25]}'
DUO = (
    "-9.584426879882812500e-05\t5.585937500000000000e-01\n"
    "1.000000000000000000e+00\t4.277343750000000000e-01\n"
    "1.000976562500000000e+00\t0.000000000000000000e+00\n"
)
DUO_CONFIG = '{"model_name": "m", "sink_size": 128, "recent_size": 256, "reg_weight": 0.05}'
MINFERENCE = """[
    {
        "0": ["vertical_and_slash", 1000, 6096, 0.98],
        "1": ["vertical_and_slash", 30, 800, 1.0000020265579224],
        "10": ["stream_llm", 100, 800, 0.5]
    },
    {
        "0": ["block_sparse", 8, 1, 0.25]
    }
]"""


def test_retrieval_head_lists_are_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "llama.json"
    path.write_text(RETRIEVAL)
    scores = from_retrieval_head(path)
    assert scores.trials.tolist() == [[[0, 0], [1, 0.25]], [[0.10344827586206896, 0], [0.5, 0.25]], [[0, 0], [0, 0.25]]]
    assert scores.mean[1].tolist() == [0.5, 0.25] and scores.top(1).heads == ((1, 0),)
    again = to_retrieval_head(scores, tmp_path / "again.json")
    assert len(again.read_text().splitlines()) == 1  # their scripts read the first line alone
    assert json.loads(again.read_text()) == json.loads(RETRIEVAL)
    np.testing.assert_array_equal(from_retrieval_head(again).trials, scores.trials)
    # as their masking script does it: the mean of a list, sorted
    ranked = sorted(json.loads(again.read_text()).items(), key=lambda one: float(np.mean(one[1])), reverse=True)
    ours = [f"{layer}-{head}" for layer, head in scores.top(4)]
    assert [name for name, _ in ranked] == ours


def test_a_retrieval_head_list_serves_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "llama.json"
    path.write_text(RETRIEVAL)
    heads, scores = head_set(str(path), 2)
    assert heads.heads == ((1, 0), (1, 1)) and scores is not None and scores.method == "retrieval"


def test_heads_with_fewer_trials_have_none_there(tmp_path: Path) -> None:
    path = tmp_path / "uneven.json"
    path.write_text('{"0-0": [0.5], "0-1": [0, 1]}')
    scores = from_retrieval_head(path)
    assert scores.n.tolist() == [[1, 2]] and scores.mean.tolist() == [[0.5, 0.5]]
    assert json.loads(to_retrieval_head(scores, path).read_text()) == {"0-0": [0.5], "0-1": [0.0, 1.0]}
    with pytest.raises(HeadscopeError, match="head 0-1 has no trial"):
        to_retrieval_head(HeadScores("x", np.array([[[1.0, np.nan]]])), path)


def test_duo_attention_gates_are_read_cut_and_written(tmp_path: Path) -> None:
    (tmp_path / GATES).write_text(DUO)
    (tmp_path / CONFIG).write_text(DUO_CONFIG)
    gates = from_duo_attention(tmp_path)
    assert gates.mean.tolist() == [[0, 0.55859375], [1, 0.427734375], [1, 0]]  # clip(gates, 0, 1), as their loader
    assert gates.provenance["parameters"] == {"group": 1, "sink_size": 128, "recent_size": 256}
    assert gates.above(0.5).heads == ((1, 0), (2, 0), (0, 1))
    wide = from_duo_attention(tmp_path, group=3)  # GQA: query heads 0, 1, 2 share the first gate
    assert wide.mean[0].tolist() == [0, 0, 0] + [0.55859375] * 3
    out = to_duo_attention(wide, tmp_path / "out", sink_size=64, recent_size=256, group=3, model_name="m")
    assert (out / GATES).read_text().splitlines()[1] == DUO.splitlines()[1]  # numpy.savetxt's own form
    assert json.loads((out / CONFIG).read_text()) == {"model_name": "m", "sink_size": 64, "recent_size": 256}
    np.testing.assert_array_equal(from_duo_attention(out).mean, gates.mean)
    with pytest.raises(HeadscopeError, match="pool them first"):
        to_duo_attention(wide, tmp_path / "no", sink_size=64, recent_size=256, group=2)


def test_minference_patterns_are_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(MINFERENCE)
    patterns = HeadPatterns.from_minference(path)
    assert list(patterns) == [(0, 0), (0, 1), (0, 10), (1, 0)] and len(patterns) == 4
    assert patterns[0, 1] == SparsePattern("vertical_and_slash", 30, 800, 1.0000020265579224)
    assert patterns.get((1, 5), MISSING).slash == 6096  # their runtime's default
    assert patterns.heads("vertical_and_slash").heads == ((0, 0), (0, 1))
    assert patterns.heads("vertical_and_slash", 30).heads == ((0, 1),) and patterns.heads("stream_llm").weights == (
        0.5,
    )
    trial = patterns.scores().mean
    assert trial.shape == (2, 11) and trial[1, 0] == 0.25 and np.isnan(trial[1, 1])
    again = patterns.to_minference(tmp_path / "again.json")
    assert json.loads(again.read_text()) == json.loads(MINFERENCE)
    assert HeadPatterns.from_minference(again) == patterns


@pytest.mark.parametrize("text", ["", "[]", '{"0": [1]}', '{"0-0": 3}', '{"0-0": ["a"]}', "{}", '{"0-0": []'])
def test_broken_retrieval_lists_are_one_line(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "x.json").write_text(text)
    with pytest.raises(HeadscopeError, match="no head list of Retrieval_Head") as error:
        from_retrieval_head(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("gates", "config"),
    [("a\tb\n", DUO_CONFIG), ("1\t0\n1\n", DUO_CONFIG), (DUO, "{}"), (DUO, '{"sink_size": null, "recent_size": 3}')],
)
def test_broken_duo_folders_are_one_line(tmp_path: Path, gates: str, config: str) -> None:
    (tmp_path / GATES).write_text(gates)
    (tmp_path / CONFIG).write_text(config)
    with pytest.raises(HeadscopeError, match="no folder of DuoAttention"):
        from_duo_attention(tmp_path)


@pytest.mark.parametrize(
    "text", ["3", "[3]", '[{"0": ["flex", 1, 1, 1]}]', '[{"0": ["stream_llm", 1.5, 1, 1]}]', '[{"a": 1}]', "nothing"]
)
def test_broken_minference_files_are_one_line(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "x.json").write_text(text)
    with pytest.raises(HeadscopeError, match="no head configuration of MInference"):
        HeadPatterns.from_minference(path)
