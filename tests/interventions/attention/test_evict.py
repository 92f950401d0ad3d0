"""Eviction equals a cache from which the keys were really taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.cache import POLICIES
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import prompt_boundary
from headscope.interp.sites import attached
from headscope.interp.sites.rotary import rotations
from headscope.interventions import EvictKeys, apply

READ, WHOLE, BUDGET = 12, 18, 5


class Chooses(Handler):
    """Keeps what a policy keeps of every layer's prompt."""

    def __init__(self, policy: Any, turned: Any) -> None:
        self.policy, self.turned, self.kept = policy, turned, list[Tensor]()

    def edit(self, call: AttentionCall) -> AttentionCall:
        reading = Reading(call, torch.tensor([READ]), rotation=self.turned[call.module, call.layer])
        self.kept.append(self.policy.sets(reading, [Budget.of(BUDGET)])[0])
        return call


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 60, (1, WHOLE), generator=torch.Generator().manual_seed(4))


def pruned(lm: LanguageModel, ids: Tensor, policy: Any) -> Tensor:
    """Logits of the rows after the prompt, from a cache that holds the kept keys alone, at their own positions."""
    chooses = Chooses(policy, rotations(lm.model, None))
    with attached(lm, chooses), torch.no_grad():
        cache = lm.model(ids[:, :READ], use_cache=True).past_key_values
    for layer, kept in zip(cache.layers, chooses.kept, strict=True):
        for name in ("keys", "values"):
            x = getattr(layer, name)
            one = kept.expand(-1, x.shape[1], -1)
            setattr(layer, name, x[one].view(1, x.shape[1], BUDGET, -1))
    at = torch.arange(READ, WHOLE)[None]
    with torch.no_grad():
        return lm.model(ids[:, READ:], past_key_values=cache, position_ids=at).logits


@pytest.mark.parametrize(
    ("name", "options"),
    [("snapkv", {"window": 3}), ("h2o", {}), ("tova", {}), ("keydiff", {"block": 2}), ("expected_attention", {})],
)
def test_it_is_the_pruned_cache(llama: LanguageModel, ids: Tensor, name: str, options: dict[str, Any]) -> None:
    """In one pass, in two and in generation's own steps; float32 logits in another order of summation: 1e-5."""
    wanted = pruned(llama, ids, POLICIES[name](**options))
    with torch.no_grad():
        plain = llama.model(ids).logits[:, READ:]
    close = 1e-5 * float(wanted.abs().max())
    edit = EvictKeys(policy=name, budget=BUDGET, options=options, read=READ)
    with apply(llama, edit), torch.no_grad():
        once = llama.model(ids).logits[:, READ:]
        cache = llama.model(ids[:, :READ], use_cache=True).past_key_values
        steps = [llama.model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(READ, WHOLE)]
    assert float((once - wanted).abs().max()) <= close
    assert float((torch.cat(steps, 1) - wanted).abs().max()) <= close
    assert float((plain - wanted).abs().max()) > 1e3 * close
    by_boundary = EvictKeys(policy=name, budget=BUDGET, options=options, during="answer")
    with apply(llama, by_boundary), prompt_boundary(READ + 1), torch.no_grad():
        assert float((llama.model(ids).logits[:, READ:] - wanted).abs().max()) <= close


def test_streaming_sees_sinks_and_the_last(llama: LanguageModel, ids: Tensor) -> None:
    """Every row, as with a mask of its own."""
    gap = torch.arange(WHOLE)[:, None] - torch.arange(WHOLE)[None, :]
    shown = (gap >= 0) & ((gap < 3) | (torch.arange(WHOLE) < 2))
    with torch.no_grad():
        wanted = llama.model(ids, attention_mask=shown[None, None]).logits
    with apply(llama, EvictKeys(policy="streaming_llm", budget=5, options={"sink": 2})), torch.no_grad():
        found = llama.model(ids).logits
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"policy": "oracle"}, "cannot run oracle: the rows that it looks at are still to come"),
        ({"policy": "top_k"}, "cannot run top_k"),
        ({"policy": "dapq"}, "cannot run dapq"),
        ({"policy": "streaming_llm", "budget": 0.5}, "takes a number of keys"),
        ({"options": {"windw": 3}}, "did you mean 'window'"),
        ({"read": 0}, "whole number of tokens"),
        ({"budget": 0}, "a budget is"),
    ],
)
def test_what_it_cannot_run_gets_one_line(given: dict[str, Any], said: str) -> None:
    with pytest.raises(HeadscopeError, match=said) as error:
        EvictKeys(**given)
    assert "\n" not in str(error.value)


def test_a_budget_that_holds_the_prompt_says_that_nothing_changed(llama: LanguageModel, ids: Tensor) -> None:
    with (
        pytest.warns(UserWarning, match="its budget holds all of it"),
        apply(llama, EvictKeys(policy="knorm", budget=64, read=READ)),
        torch.no_grad(),
    ):
        found = llama.model(ids).logits
    torch.testing.assert_close(found, llama.model(ids).logits)


@pytest.mark.slow
def test_smollm2_answers_from_what_is_kept(smollm2: Any) -> None:
    """A key named early is recalled with all of the prompt kept, and not when streaming heads have lost it."""
    text = "The brass key is under the flowerpot. " + "It rained all day and nobody came. " * 12
    prompt = text + "Question: where is the brass key? Answer: The brass key is under the"
    word = " flowerpot"

    def chance(*edits: Any) -> float:
        encoded = smollm2.encode(prompt)["input_ids"]
        with apply(smollm2, *edits), prompt_boundary(encoded.shape[1]), torch.no_grad():
            logits = smollm2.model(encoded).logits[0, -1]
        first = smollm2.tokenizer(word, add_special_tokens=False)["input_ids"][0]
        return float(logits.softmax(-1)[first])

    many = EvictKeys(policy="snapkv", budget=0.9, options={"window": 16}, during="answer")
    assert chance() > 0.5 and chance(many) > 0.5
    assert chance(EvictKeys(policy="streaming_llm", budget=32)) < 0.1
