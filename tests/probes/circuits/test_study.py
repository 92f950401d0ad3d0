"""A study writes its files, and a second run takes finished steps from the first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.sealed import unsealed
from headscope.probes.circuits import study
from headscope.probes.circuits.circuit import Circuit
from headscope.probes.patching.pairs import Pairs


def test_a_killed_study_goes_on(
    planted: LanguageModel, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(study.TASKS, "made up", lambda lm, count, seed: pairs)
    settings = dict(size=3, randoms=2, progress=False)
    broken = pytest.raises(RuntimeError, match="killed")
    with monkeypatch.context() as patched, broken:
        patched.setattr(study, "evaluate_circuit", _killed)
        study.study_circuit(planted, "made up", tmp_path, **settings)
    with monkeypatch.context() as patched:
        patched.setattr(study, "find_circuit", _killed)  # is not asked again
        found = study.study_circuit(planted, "made up", tmp_path, **settings)
    assert set(found.circuit.heads) == {(0, 1), (1, 2), (2, 3)} and found.circuit.edges
    assert Circuit.load(tmp_path / "circuit.json").edges == found.circuit.edges
    held = unsealed(json.loads((tmp_path / "evaluation.json").read_text()))
    assert held["evaluation"]["summary"][0]["value"] == pytest.approx(1, abs=1e-4)
    assert list(found.curve["size"]) == [1, 2, 5, 10, 12] and "plotly" in (tmp_path / "circuit.html").read_text()
    with pytest.raises(HeadscopeError, match="other settings"):
        study.study_circuit(planted, "made up", tmp_path, **settings | {"size": 2})
    other = replace(pairs, answers=pairs.others, others=pairs.answers)  # a task whose pairs are no longer the same
    monkeypatch.setitem(study.TASKS, "made up", lambda lm, count, seed: other)
    with pytest.raises(HeadscopeError, match="other settings .pairs"):
        study.study_circuit(planted, "made up", tmp_path, **settings)
    with pytest.raises(HeadscopeError, match="no task"):
        study.study_circuit(planted, "greater than")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("size", "a", "size='a': give a whole number, at least 1"),
        ("size", 2.5, "size=2.5"),
        ("size", 99, "size=99: choose 1 to 12 heads"),
        ("count", 0, "count=0"),
        ("budget", "x", "budget='x'"),
        ("seed", True, "seed=True"),
        ("mlps", "yes", "mlps='yes': say true or false"),
        ("ablation", "x", "no ablation 'x': name one of mean, zero, resample"),
        ("method", ["path"], "no method"),
        ("searched", 11, "searched=11: search among 0 to 10"),
    ],
)
def test_settings_are_refused_before_anything_is_written(
    planted: LanguageModel, tmp_path: Path, name: str, value: object, words: str
) -> None:
    with pytest.raises(HeadscopeError, match=words):
        study.study_circuit(planted, out=tmp_path / "new", progress=False, **{name: value})
    assert not (tmp_path / "new").exists()


def _killed(*args: object, **settings: object) -> None:
    raise RuntimeError("killed")
