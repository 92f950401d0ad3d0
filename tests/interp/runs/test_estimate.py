"""Dry runs stop where work would begin; estimates count what will run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from headscope.interp.heads.base import HeadMethod, Scored
from headscope.interp.heads.discovery import discover
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs import estimate as module
from headscope.interp.runs.estimate import Planned, Work, announce, dry_run, estimate
from headscope.interp.runs.journal import Trial
from headscope.interp.survey.tiny import tiny_model


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.wrap(tiny_model("llama"))


def test_begin_does_nothing_outside_a_dry_run() -> None:
    announce([(1, 2)], ["a"])


def test_a_dry_run_stops_at_begin_and_keeps_the_work() -> None:
    after = []
    with dry_run() as planned:
        announce(((n, 0) for n in (3, 4)), ["a.json"])
        after.append("ran")
    assert after == [] and planned == Work([(3, 0), (4, 0)], ["a.json"])
    announce([(1, 2)], [])  # the dry run is over


def test_a_dry_run_without_work_is_empty_and_errors_pass_through() -> None:
    with dry_run() as planned:
        pass
    assert planned == Work()
    with pytest.raises(ZeroDivisionError), dry_run():
        _ = 1 / 0
    announce([(1, 2)], [])


def test_nested_dry_runs_stop_the_inner_block_only() -> None:
    with dry_run() as outer:
        with dry_run() as inner:
            announce([(1, 0)], [])
        announce([(2, 0)], [])
    assert inner.passes == [(1, 0)] and outer.passes == [(2, 0)]


def test_planned_says_what_it_is() -> None:
    with pytest.raises(Planned, match="dry run"):
        raise Planned(Work())


def test_discovery_in_a_dry_run_scores_nothing_and_writes_nothing(lm: LanguageModel, tmp_path: Path) -> None:
    scored = []

    @dataclass(frozen=True, kw_only=True)
    class Counting(HeadMethod):
        name: ClassVar[str] = "counting"

        def trials(self, lm: LanguageModel) -> list[Trial]:
            return [{"length": 5}, {"length": 9}]

        def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
            return trial["length"], 1

        def score(self, lm: LanguageModel, trial: Trial) -> Scored:
            scored.append(trial)
            return np.full((lm.info.layers, lm.info.heads), 1.0), {}

    with dry_run() as planned:
        discover([Counting()], lm, out=tmp_path / "run")
    assert planned.passes == [(5, 1), (9, 1)] and not scored and not (tmp_path / "run").exists()
    discover([Counting()], lm, out=tmp_path / "run", progress=False)
    assert len(scored) == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(planned.files)


def test_passes_and_tokens_are_counted(lm: LanguageModel) -> None:
    found = estimate(lm, Work([(10, 3), (20, 0), (5, 2)], ["a.json"]))
    assert found["prompts"] == 3
    assert found["forward_passes"] == 3 + 3 + 2
    assert found["tokens"] == 13 + 20 + 7
    assert found["files"] == ["a.json"]
    assert found["seconds"] >= 0 and found["memory_mib"] >= 0


def test_no_work_takes_no_time(lm: LanguageModel) -> None:
    found = estimate(lm, Work())
    assert (found["forward_passes"], found["tokens"], found["seconds"]) == (0, 0, 0.0)


def test_seconds_are_the_calibration_times_the_work(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ms a prompt token and 30 ms a decoding step; the quadratic part relative to the linear one, by the formula."""
    monkeypatch.setattr(module, "_calibrate", lambda lm: (0.002, 0.03))
    info = lm.info
    linear = 2 * (info.parameters - info.vocab_size * info.d_model)  # FLOP a token in the weights
    # FLOP a token in Q K^T and P V together: 2 products of 2 d_head FLOP for each of half the keys, causally
    quadratic = info.layers * info.heads * 2 * 2 * info.d_head * 10_000 / 2
    found = estimate(lm, Work([(10_000, 7)]))
    assert found["seconds"] == pytest.approx(0.002 * 10_000 * (1 + quadratic / linear) + 0.03 * 7, abs=0.06)


def test_memory_is_weights_cache_and_activations(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_calibrate", lambda lm: (0.0, 0.0))
    info, length = lm.info, 1_000_000
    cache = 2 * info.layers * info.kv_heads * info.d_head * length * 4
    found = estimate(lm, Work([(10, 0), (length - 3, 3)]))["memory_mib"]
    expected = (info.parameters * 4 + cache + 8 * length * info.d_model * 4) / 2**20
    assert found == pytest.approx(expected, abs=1)
    halves = LanguageModel.wrap(tiny_model("llama", dtype=torch.bfloat16))
    assert estimate(halves, Work([(length - 3, 3)]))["memory_mib"] == pytest.approx(expected / 2, abs=1)


def test_calibration_runs_within_a_short_context_and_changes_nothing() -> None:
    model = tiny_model("gpt2")
    lm = LanguageModel.wrap(model)
    ids = torch.arange(6)[None]
    state = torch.random.get_rng_state()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        prefill, step = module._calibrate(lm)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert prefill > 0 and step > 0
    assert torch.equal(torch.random.get_rng_state(), state)
