"""Spans by name: a statistic and an edit that say "needle" mean the right tokens in every trial of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope.interp import trace
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import prompt_boundary, published_spans
from headscope.interp.statistics import SpanMass
from headscope.interp.statistics.plan import Plan
from headscope.interp.statistics.spans import members
from headscope.interventions import Edit, evaluate
from headscope.interventions.tasks.base import Task

PLACES = [(1, 3), (4, 9), (0, 1)]


@dataclass(frozen=True)
class Hide(Edit):
    """Take the keys of a span away from every query (for this test: no head is named)."""

    keys: Any = (0, 1)

    def edit(self, call: Any) -> Any:
        held = members(self.keys, Plan(call).key_positions, call.query.shape[0])
        return call.with_key_bias(torch.where(held, -1e30, 0.0)[:, None])


@dataclass(frozen=True)
class Hidden(Task):
    """A logit of prompts that each have a span of their own."""

    name: ClassVar[str] = "hidden"
    metric: ClassVar[str] = "a logit"

    def trials(self, lm: Any) -> list[dict[str, Any]]:
        ids = torch.randint(2, 64, (3, 10), generator=torch.Generator().manual_seed(1))
        return [{"ids": row.tolist(), "at": list(place)} for row, place in zip(ids, PLACES, strict=True)]

    def tokens(self, lm: Any, trial: dict[str, Any]) -> tuple[int, int]:
        return len(trial["ids"]), 0

    def run(self, lm: Any, trial: dict[str, Any]) -> dict[str, Any]:
        with published_spans({"needle": tuple(trial["at"])}), prompt_boundary(len(trial["ids"])):
            return {"score": float(lm.model(torch.tensor([trial["ids"]])).logits[0, -1, 0])}


def by_hand(lm: LanguageModel, trial: dict[str, Any]) -> float:
    """The model's own eager attention under a mask that hides the trial's keys from everybody."""
    ids = torch.tensor([trial["ids"]])
    mask = torch.full((10, 10), float("-inf")).triu(1)
    mask[:, slice(*trial["at"])] = torch.finfo(torch.float32).min
    mask = mask.clamp(min=torch.finfo(torch.float32).min)
    lm.model.set_attn_implementation("eager")
    with torch.no_grad():
        found: Tensor = lm.model(ids, attention_mask=mask[None, None]).logits
    lm.model.set_attn_implementation("sdpa")
    return float(found[0, -1, 0])


def test_an_edit_on_the_needle_acts_at_the_right_keys_in_each_trial(llama: LanguageModel) -> None:
    task = Hidden()
    result = evaluate(llama, task, Hide(keys="needle"), progress=False)
    scores = result.scores("hidden")
    expected = [by_hand(llama, trial) for trial in task.trials(llama)]
    np.testing.assert_allclose(scores.iloc[:2, 1], expected[:2], rtol=1e-4)  # the last row sees other keys there
    assert (abs(scores.iloc[:, 1] - scores.iloc[:, 0]) > 1e-3).all()
    wrong = evaluate(llama, task, Hide(keys=PLACES[0]), progress=False).scores("hidden").iloc[:, 1]
    assert wrong[0] == scores.iloc[0, 1] and abs(wrong[1] - scores.iloc[1, 1]) > 1e-3


def test_a_statistic_by_name_is_the_statistic_by_position(llama: LanguageModel) -> None:
    ids = torch.tensor([trial["ids"] for trial in Hidden().trials(llama)])
    with trace(llama, [SpanMass({"needle": "needle", "first": (0, 1)})]) as tracer, published_spans({"needle": PLACES}):
        llama.model(ids)
    with trace(llama, [SpanMass({"needle": PLACES, "first": (0, 1)})]) as expected:
        llama.model(ids)
    assert (tracer.record["span_mass"] == expected.record["span_mass"]).all()
    with trace(llama, [SpanMass({"needle": "needel"})]):
        with published_spans({"needle": PLACES}), published_spans({"image": (0, 2)}):
            with pytest.raises(HeadscopeError, match="'needel': this prompt has needle, image; give positions"):
                llama.model(ids)
        with pytest.raises(HeadscopeError, match="this prompt publishes none"):
            llama.model(ids)
    with pytest.raises(HeadscopeError, match="is no span"), published_spans({"needle": 3}):
        raise AssertionError("entered")
