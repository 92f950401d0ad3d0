"""Every named architecture: traced statistics equal the weights of the model's own eager attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import verify
from headscope.interp.sites.inputs import example_inputs
from headscope.interp.sites.towers import parse_name
from headscope.interp.statistics import Distance, Entropy, KeyMass, SinkMass, TopKeys, WindowMass
from headscope.interp.survey.eager import eager_weights
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace

EPS = torch.finfo(torch.float32).eps
FAST = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "opt", "gpt_neox", "gpt_oss", "deepseek_v3", "llama4_text"]
SLOW = (
    "mistral mixtral qwen2 qwen3_moe qwen3_next gemma3n_text gemma4_text phi phi3 gpt_bigcode starcoder2 cohere olmo2 "
    "granite smollm3 stablelm"
).split()
CAUSAL = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
UNROUTED = ["falcon", "bloom", "mpt", "gptj", "gpt_neo", "codegen"]
STATISTICS = [Entropy(), SinkMass(2), WindowMass(4), Distance(), TopKeys(1), KeyMass()]


def weights_of(model, inputs) -> dict[int, torch.Tensor]:
    """The language tower's eager weights by layer."""
    with eager_weights(model) as seen, torch.no_grad():
        model(**inputs, use_cache=False)
    return {parse_name(name, None)[1]: weights for name, weights in seen}


def check(record, weights: dict[int, torch.Tensor], mask: torch.Tensor) -> None:
    """Every statistic of ``record`` against the eager ``weights`` (batch, head, query, key) of unpadded positions.

    Softmax in float32 of scores of a few units loses about 16 eps; a sum over n keys at most n times that.
    """
    assert sorted(weights) == record["layer"].to_numpy().tolist()
    for b in range(mask.shape[0]):
        at = mask[b].nonzero()[:, 0]
        first, n = int(at[0]), len(at)
        assert int(record["length"][b]) == n
        for layer, whole in weights.items():
            p = whole[b].double()[:, first : first + n, first : first + n].numpy()
            here = record.sel(example=b, layer=layer).isel(query=slice(n))
            gap = np.arange(n)[:, None] - np.arange(n)
            near = 64 * n * EPS
            np.testing.assert_allclose(here["sink_mass"], p[..., :2].sum(-1), atol=near)
            np.testing.assert_allclose(here["window_mass"], (p * ((gap >= 0) & (gap < 4))).sum(-1), atol=near)
            np.testing.assert_allclose(here["distance"], (p * gap).sum(-1), atol=near * n)
            np.testing.assert_allclose(here["top_mass"][..., 0], p.max(-1), atol=near)
            entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
            np.testing.assert_allclose(here["entropy"], entropy, atol=near * np.log(n))
            np.testing.assert_allclose(here["key_mass"][:, :n], p.sum(1), atol=near * n)


@pytest.mark.parametrize("name", CAUSAL)
def test_statistics_equal_eager_weights(name):
    model = tiny_model(name)
    inputs = example_inputs(model)
    found = verify(model, inputs)
    assert found.passed, found.problems
    with trace(model, STATISTICS) as tracer:
        model(**inputs, use_cache=False)
    weights = weights_of(model, inputs)
    spread = max(float(w.max()) for w in weights.values())
    assert spread > 0.3, "the patterns are too uniform for this test to notice a mistake"
    check(tracer.record, weights, inputs["attention_mask"])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generation_gives_the_same_tokens(name, cache):
    model = tiny_model(name)
    ids = example_inputs(model, padding=False)["input_ids"]
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
    options |= {"disable_compile": True, "pad_token_id": 0, "attention_mask": padded}
    plain = model.generate(ids, **options)
    with trace(model, [Entropy(), KeyMass()]) as tracer:
        traced = model.generate(ids, **options)
    assert torch.equal(plain, traced)
    assert tracer.record["length"].to_numpy().tolist() == [23, 28]
    assert tracer.record["prompt_length"].to_numpy().tolist() == [19, 24]


@pytest.mark.parametrize("name", UNROUTED)
def test_architectures_with_attention_of_their_own_are_refused_by_name(name):
    model = tiny_model(name)
    with pytest.raises(HeadscopeError, match=f"{type(model).__name__}.*refused"):
        with trace(model, [Entropy()]):
            raise AssertionError("the block must not be entered")


def test_a_kernel_that_drops_sink_logits_is_refused_with_the_way_out():
    model = tiny_model("gpt_oss")
    model.config._attn_implementation = "sdpa"
    with pytest.raises(HeadscopeError, match="sdpa leaves out its sink logits: load the model with attn_impl"):
        with trace(model, [Entropy()]):
            raise AssertionError("the block must not be entered")
