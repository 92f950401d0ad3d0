"""Where one right computation flushes a tiny probability to zero and the other keeps it, they still agree."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.interp.attention.call import AttentionCall
from headscope.interp.sites import verify
from headscope.interp.sites.agreement import Verification, compare_call
from headscope.kernels.masks import Mask

TINY = torch.finfo(torch.float32).smallest_normal


def call_with_probabilities(*logs: float) -> AttentionCall:
    """One query that gives its keys these logarithms of probabilities, beside a first key that gets nearly all."""
    keys = torch.zeros(1, 1, 1 + len(logs), 16)
    keys[0, 0, 1:, 0] = torch.tensor(logs)
    query = torch.zeros(1, 1, 1, 16)
    query[..., 0] = 1
    values = torch.ones_like(keys)
    return AttentionCall(query=query, key=keys, value=values, mask=Mask.full(), scale=1.0, layer=0, module="m")


def found(call: AttentionCall, change: Any) -> Verification:
    """The comparison of a call with itself in float64, its probabilities changed."""
    scores = call.query.double() @ call.key.double().mT
    p = change(torch.softmax(scores, -1))

    def run(value: Tensor) -> Tensor:
        return (p @ value.double()).transpose(1, 2).float()

    seen = Verification(calls=1)
    seen.note(call, compare_call(call, run(call.value), run))
    return seen


def test_what_a_fast_exponential_flushes_is_within_the_bound() -> None:
    """2^n 2^f with n = round(log2 p): zero from n = -126 down, so up to sqrt(2) of the smallest normal number."""
    call = call_with_probabilities(*(math.log(TINY) + x for x in (-0.3, 0.01, 0.1, 0.25, 0.34, 0.4, 1.0)))
    assert found(call, lambda p: torch.where(torch.round(torch.log2(p)) <= -126, 0.0, p)).passed


def test_what_is_larger_is_not_and_the_message_shows_it() -> None:
    call = call_with_probabilities(math.log(TINY) + 0.4, math.log(TINY) + 3.0)
    seen = found(call, lambda p: torch.where(p < 1e-30, 0.0, p))
    assert not seen.passed
    assert "0 for our 2.36e-37 at example 0, head 0, query 0, key 2" in seen.problems[0]


@pytest.mark.parametrize("seed", range(6))
def test_a_llama_with_large_queries_and_keys_passes(seed: int) -> None:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=96, vocab_size=200)).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.normal_(0, 0.9)
        layer.self_attn.k_proj.weight.data.normal_(0, 0.9)
    assert verify(model).problems == []
