"""Ray's actors beside this process: the same record and the same scores, also where a worker is killed.

The batches are the same, so that integers are equal and other numbers differ by the rounding of a product that another
process computes: not at all on one machine.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from headscope.interp import load_record, sweep, tiny_model
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads import discover
from headscope.interp.heads.lookup.previous_token import PreviousToken
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.actors import Ray
from headscope.interp.statistics import Entropy, KeyMass, TopKeys
from headscope.interventions import AblateHeads, apply, evaluate
from headscope.interventions.tasks.base import Task

ray = pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = pytest.mark.slow
PROMPTS = [[4 + (7 * i + j) % 90 for j in range(5 + i)] for i in range(16)]
QUIET: dict[str, Any] = {"largest": 2, "progress": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this host, with classes of this file sent as they are: workers do not see the tests."""
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Killing(Entropy):
    """Entropy, which kills the process that asks for it first."""

    mark: str = ""

    def ask(self, plan: Any) -> Any:
        if not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().ask(plan)


def test_a_killed_worker_loses_nothing(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "cache"))
    lm, mark = LanguageModel.wrap(tiny_model("llama")), tmp_path / "killed"
    statistics = [Killing(mark=str(mark)), TopKeys(2), KeyMass()]
    found = sweep(lm, PROMPTS, statistics, out=f"memory://{tmp_path.name}/run", engine=Ray(workers=2), **QUIET)
    assert mark.exists()
    expected = sweep(lm, PROMPTS, statistics, out=tmp_path / "here", **QUIET).load()
    for record in (found.load(), load_record(f"memory://{tmp_path.name}/run")):
        assert dict(record.sizes) == dict(expected.sizes)
        for name in expected.data_vars:
            np.testing.assert_allclose(record[name], expected[name], atol=1e-6)


def test_scores_of_actors_are_those_of_this_process(cluster: None, tmp_path: Path) -> None:
    lm = LanguageModel.wrap(tiny_model("llama"))
    methods = [PreviousToken(samples=4, batch=2)]
    (found,) = discover(methods, lm, out=tmp_path / "run", engine=Ray(workers=1), progress=False)
    (expected,) = discover(methods, lm, progress=False)
    np.testing.assert_allclose(found.trials, expected.trials, atol=1e-6)


@dataclass(frozen=True)
class Summed(Task):
    """The logits of a token, summed over a prompt, three prompts at a time."""

    name: ClassVar[str] = "summed"
    metric: ClassVar[str] = "logits"
    together: ClassVar[int] = 3  # type: ignore[assignment,misc]
    mark: str = ""

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        return {}

    def trials(self, lm: LanguageModel) -> list[dict[str, Any]]:
        return [{"ids": prompt} for prompt in PROMPTS[:5]]

    def tokens(self, lm: LanguageModel, trial: dict[str, Any]) -> tuple[int, int]:
        return len(trial["ids"]), 0

    def logits(self, lm: LanguageModel, trial: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            return lm.model(input_ids=torch.tensor([trial["ids"]])).logits[0, :, 5]

    def run(self, lm: LanguageModel, trial: dict[str, Any]) -> dict[str, Any]:
        return {"score": float(self.logits(lm, trial).sum()), "process": os.getpid()}


@dataclass(frozen=True)
class Moved(Summed):
    """How far they are from the unedited ones; kills the process that has seen an edit first."""

    name: ClassVar[str] = "moved"
    together: ClassVar[int] = 1  # type: ignore[assignment,misc]

    def prepare(self, lm: LanguageModel, trial: dict[str, Any]) -> dict[str, Any]:
        return {**trial, "unedited": self.logits(lm, trial)}

    def run(self, lm: LanguageModel, trial: dict[str, Any]) -> dict[str, Any]:
        score = float((self.logits(lm, trial) - trial["unedited"]).abs().sum())
        if self.mark and score and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"score": score, "process": os.getpid()}


def test_an_evaluation_in_actors_is_that_of_this_process(cluster: None, tmp_path: Path) -> None:
    """It goes on where this process was killed, with every condition's edit; a killed worker's trials run again."""
    lm, mark = LanguageModel.wrap(tiny_model("llama")), tmp_path / "killed"
    asked: dict[str, Any] = {"interventions": AblateHeads("L0H1,L1H2"), "controls": 9, "out": tmp_path / "run"}
    expected = evaluate(lm, [Summed(), Moved()], **asked, progress=False).trials
    journal = tmp_path / "run" / "evaluation.trials.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:20]))  # its settings, and 19 of 110 trials
    found = evaluate(lm, [Summed(), Moved(mark=str(mark))], **asked, progress=False, engine=Ray(workers=2)).trials
    assert mark.exists() and (found["process"] == os.getpid()).sum() == 19
    assert len(journal.read_bytes().splitlines()) == len(lines) == 111
    assert found.drop(columns=["score", "process"]).equals(expected.drop(columns=["score", "process"]))
    np.testing.assert_allclose(found["score"], expected["score"], atol=1e-6)
    effect = expected[(expected["task"] == "moved") & (expected["condition"] != "no edit")]["score"]
    assert effect.min() > 1e-2  # an edit that had stayed behind would show


def test_what_cannot_be_done_in_actors_is_one_line(cluster: None, tmp_path: Path) -> None:
    lm = LanguageModel.wrap(tiny_model("llama"))
    with apply(lm, AblateHeads("L0H1")), pytest.raises(HeadscopeError, match="is in force"):
        evaluate(lm, [Summed()], progress=False, engine="ray")
    with apply(lm, AblateHeads("L0H1")), pytest.raises(HeadscopeError, match="is in force"):
        sweep(lm, PROMPTS, [Entropy()], out=tmp_path / "edited", engine="ray", **QUIET)
    with pytest.raises(HeadscopeError, match="no engine 'spark'"):
        sweep(lm, PROMPTS, [Entropy()], out=tmp_path / "spark", engine="spark", **QUIET)

    def refuses(held: Any, piece: Any) -> None:
        raise HeadscopeError(f"no {piece}")

    def dies(held: Any, piece: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(HeadscopeError, match="no 1"):
        list(Ray(workers=1).map(dict, refuses, [1]))
    with pytest.raises(HeadscopeError, match="died 2 times"):
        list(Ray(workers=1, tries=2).map(dict, dies, [1]))
