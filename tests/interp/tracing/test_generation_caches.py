"""Caches of ``generate``: static, quantized and offloaded ones give the record of a dynamic one."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

from headscope.interp import trace
from headscope.interp.statistics import Distance, Entropy, KeyMass, LogSumExp, SinkMass, TopKeys
from headscope.interp.survey.eager import eager_weights
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


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_model_that_sees_both_ways_continues_its_cache(name: str) -> None:
    """Its masks count queries from 0 in every pass: the steps of a generation are nevertheless rows of one text."""
    model, start = tiny_model(name), 4
    ids = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :start] = 0
    options = {"attention_mask": mask, "min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with trace(model, [Entropy()]) as tracer:
        model.generate(input_ids=ids, **options)
    with eager_weights(model) as weights:
        model.generate(input_ids=ids, **options)
    assert tracer.record["length"].to_numpy().tolist() == [12 - start + 2, 14]
    calls = [p.double() for name, p in weights if ".layer.0." in name]
    assert [p.shape[2] for p in calls] == [12, 1, 1]
    for example, first in enumerate((start, 0)):
        rows = [calls[0][example, :, first:], *(p[example] for p in calls[1:])]
        wanted = torch.cat([-(p * p.clamp(min=1e-300).log()).sum(-1) for p in rows], 1)
        found = torch.from_numpy(tracer.record["entropy"].to_numpy()[example, 0, :, : wanted.shape[1]]).double()
        assert (found - wanted).abs().max() < 1e-5
