"""Attaching where nothing is read: the model's own attention runs, bitwise, and what it costs is a few Python calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from headscope.interp import trace
from headscope.interp.attention.call import AttentionCall
from headscope.interp.benchmarks import attaching
from headscope.interp.sites.huggingface import attention as hf_attention
from headscope.interp.sites.huggingface import calls as hf_calls
from headscope.interp.sites.huggingface import own
from headscope.interp.sites.huggingface.masks import LazyMask
from headscope.interp.statistics import Entropy, LogSumExp
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import AblateHeads, apply

MODELS = ["llama", "gemma3_text", "gpt2", "gpt_oss"]  # plain, windows, absolute positions, eager with sink logits


def batch(length: int = 24) -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (2, length), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    real[0, :5] = 0
    return {"input_ids": ids, "attention_mask": real}


def run(model: Any, hidden: int | None = None) -> list[Tensor]:
    """Logits of a padded prompt and of two decoding steps, or the stream after the first ``hidden`` layers."""
    inputs, found = batch(), []
    options = {"output_hidden_states": hidden is not None}

    def keep(output: Any) -> None:
        found.append(output.logits if hidden is None else output.hidden_states[hidden])

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        keep(model(**inputs, past_key_values=cache, **options))
        for step in range(2):
            real = torch.cat([inputs["attention_mask"], torch.ones(2, step + 1, dtype=torch.long)], dim=1)
            keep(model(inputs["input_ids"][:, :1], attention_mask=real, past_key_values=cache, **options))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_nobody_reads_are_bitwise_the_models_own(name: str) -> None:
    """With no layer, the whole model; with the last, what comes before it."""
    model = tiny_model(name)
    plain = run(model)
    with trace(model, [Entropy()], layers=[]):
        found = run(model)
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
    below = run(model, hidden=1)
    with trace(model, [Entropy()], layers=[1]) as tracer:
        found = run(model, hidden=1)
    assert tracer.record["layer"].to_numpy().tolist() == [1]
    assert all(torch.equal(one, other) for one, other in zip(below, found, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_only_layers_that_somebody_reads_or_changes_become_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, make = tiny_model(name), set(), hf_calls.make_call

    def noting(*args: Any) -> AttentionCall:
        call = make(*args)
        seen.add(call.layer)
        return call

    with trace(model, [Entropy()], layers=[1]), apply(model, AblateHeads([(1, 0)])):  # verified before we count
        pass
    monkeypatch.setattr(hf_attention, "make_call", noting)
    with trace(model, [Entropy()], layers=[]):
        run(model)
    assert seen == set()
    with trace(model, [Entropy()], layers=[1]) as tracer:
        run(model)
    assert seen == {1} and tracer.record["layer"].to_numpy().tolist() == [1]
    seen.clear()
    with apply(model, AblateHeads([(0, 0)])):
        run(model)
        with trace(model, [Entropy()], layers=[1]):
            run(model)
    assert seen == {0, 1}
    with apply(model, AblateHeads([(0, 0)])), trace(model, [Entropy()]) as tracer:
        run(model)
    assert tracer.record.sizes["layer"] == 2


def test_no_mask_of_query_times_key_is_made_for_long_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    asked: list[LazyMask] = []
    original = LazyMask.original
    monkeypatch.setattr(LazyMask, "original", lambda mask, name: asked.append(mask) or original(mask, name))
    monkeypatch.setattr(own, "SMALL", 24 * 24)
    with torch.no_grad():
        plain = model(**batch()).logits
        with trace(model, [Entropy()], layers=[1], verify=False):
            found = model(**batch()).logits
    real = batch()["attention_mask"].bool()
    assert not asked  # two examples of 24 x 24 pairs
    assert torch.allclose(plain[real], found[real], atol=1e-6)


def calls(model: Any, context: Callable[[], AbstractContextManager[Any]]) -> int:
    """Function calls, of Python and of C, in one decoding step."""
    cache, ids, counted = DynamicCache(config=model.config), torch.ones(1, 5, dtype=torch.long), 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    with torch.no_grad(), context():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            model(ids[:, :1], past_key_values=cache)
        finally:
            sys.setprofile(before)
    return counted


def test_a_layer_that_nobody_reads_costs_few_calls() -> None:
    """2 % of the 600 microseconds in which two CPU cores decode a layer of SmolLM2 are 12; a call takes up to 0.3."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    few, many = (LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=n)).eval() for n in (2, 6))

    def a_layer(context: Callable[[Any], AbstractContextManager[Any]]) -> float:
        return (calls(many, lambda: context(many)) - calls(few, lambda: context(few))) / 4

    untraced = a_layer(lambda model: nullcontext())
    idle = a_layer(lambda model: trace(model, [LogSumExp()], layers=[0]))  # the others are idle
    busy = a_layer(lambda model: trace(model, [LogSumExp()]))
    assert untraced > 100
    assert idle - untraced < 40 < busy - untraced


@pytest.mark.slow
def test_attaching_costs_under_two_percent_of_a_decoding_step(smollm2: Any) -> None:
    """The added seconds, seen on a thin model of the same depth, over the fastest untraced step of the real one."""
    added = attaching.cost(smollm2.model, rounds=20)
    step = attaching.fastest_step(smollm2.model)
    assert added["idle"] / step < 0.02
