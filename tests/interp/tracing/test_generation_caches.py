"""Caches of ``generate``: static, quantized and offloaded ones give the record of a dynamic one."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

from headscope.interp import trace
from headscope.interp.statistics import Distance, Entropy, KeyMass, LogSumExp, SinkMass, TopKeys
from headscope.interp.survey.tiny import tiny_model

STATISTICS = [LogSumExp(), Entropy(), SinkMass(first=2), KeyMass(), TopKeys(2), Distance()]


def tokens(length: int = 12, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 60, (2, length), generator=torch.Generator().manual_seed(seed))


def largest_difference(one, other) -> float:
    assert set(one.data_vars) == set(other.data_vars)
    return max(float(abs(one[name] - other[name]).fillna(0).max()) for name in one.data_vars)


WINDOWED = ["mistral", "gemma3_text", "gpt_oss", "gemma3n_text"]  # windows of 8 tokens; Gemma mixes kinds of layers


def generate(model, ids, mask, **options):
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **settings, **options)


def padded(length: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(length)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids, mask


@pytest.mark.parametrize("architecture", ["llama", *WINDOWED])
def test_a_static_cache_gives_the_record_of_a_dynamic_one(architecture):
    model, (ids, mask) = tiny_model(architecture), padded()
    untraced = generate(model, ids, mask, cache_implementation="static")
    with trace(model, STATISTICS) as dynamic:
        generate(model, ids, mask)
    with trace(model, STATISTICS) as static:
        traced = generate(model, ids, mask, cache_implementation="static", return_dict_in_generate=True)
    assert isinstance(traced.past_key_values, StaticCache)
    assert torch.equal(traced.sequences, untraced)
    assert static.record["length"].to_numpy().tolist() == [24, 29]
    # the same scores; a windowed layer's key buffer is another one, so sums may be taken in another order
    assert largest_difference(static.record, dynamic.record) < 1e-5


class Rounded(QuantizedLayer):
    """Keys and values kept in 8 bits, one scale a vector: a quantized cache without its optional packages."""

    def __init__(self, residual_length: int) -> None:
        super().__init__(nbits=8, axis_key=0, axis_value=0, q_group_size=64, residual_length=residual_length)

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor):
        return q_tensor[0] * q_tensor[1]


def test_a_quantized_cache_is_traced_as_the_model_sees_it():
    """The record is of the rounded keys that attention reads: near the exact cache's, not equal to it."""
    model, (ids, mask) = tiny_model("llama"), (tokens(20), torch.ones(2, 20, dtype=torch.long))

    def cache():
        made = DynamicCache(config=model.config)
        made.layers = [Rounded(residual_length=6) for _ in made.layers]
        return made

    untraced = generate(model, ids, mask, past_key_values=cache())
    with trace(model, [Entropy(), KeyMass()]) as rounded:
        traced = generate(model, ids, mask, past_key_values=cache())
    with trace(model, [Entropy(), KeyMass()]) as exact:
        generate(model, ids, mask)
    assert torch.equal(traced, untraced)
    assert rounded.record.sizes == exact.record.sizes
    assert 1e-6 < largest_difference(rounded.record, exact.record) < 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from CUDA devices only")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache(kind):
    model, (ids, mask) = tiny_model("gemma3_text").cuda(), padded()
    ids, mask = ids.cuda(), mask.cuda()
    untraced = generate(model, ids, mask, cache_implementation=kind)
    with trace(model, STATISTICS) as tracer:
        traced = generate(model, ids, mask, cache_implementation=kind)
    with trace(model, STATISTICS) as plain:
        generate(model, ids, mask)
    assert torch.equal(traced, untraced)
    assert largest_difference(tracer.record, plain.record) < 1e-5
