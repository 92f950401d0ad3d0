"""Nulls: a twin with random weights, random targets against eager weights in float64, and counts above them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from headscope.interp import heads, load_model, tiny_model
from headscope.interp.analysis.nulls import Null, null, random_twin
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.discovery import discover
from headscope.interp.models import LanguageModel
from headscope.interp.prompts.sequences import other_keys
from headscope.interp.results.scores import HeadScores


@pytest.fixture
def lm() -> LanguageModel:
    """A tiny llama with grouped heads."""
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=32, head_dim=8, vocab_size=96)
    return load_model(tiny_model("llama", seed=3, **sizes))


def test_a_twin_has_the_configuration_and_nothing_else(lm: LanguageModel) -> None:
    lm.inner.config._commit_hash, before = "abc", torch.get_rng_state()
    kept = copy.deepcopy(lm.inner.config.to_dict())
    twin, again, other = random_twin(lm, 1), random_twin(lm, 1), random_twin(lm, 2)
    assert torch.equal(torch.get_rng_state(), before) and lm.inner.config.to_dict() == kept
    assert type(twin.inner) is type(lm.inner) and twin.tokenizer is lm.tokenizer and not twin.inner.training
    assert twin.info.heads == 4 and twin.info.kv_heads == 2 and twin.info.dtype == lm.info.dtype
    assert "random weights, seed 1" in twin.name and twin.revision == "random weights, seed 1"
    assert getattr(twin.inner.config, "_commit_hash", None) is None
    pairs = zip(twin.inner.named_parameters(), lm.inner.parameters(), other.inner.parameters(), strict=True)
    for (name, a), b, c in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype and not torch.equal(a, b), name
        assert torch.equal(a, again.inner.get_parameter(name))
        assert "norm" in name or not torch.equal(a, c)
    # transformers' own initialisation: a standard deviation is known to 1 / sqrt(2 n) of itself
    weight = twin.inner.model.layers[0].mlp.up_proj.weight
    assert float(weight.detach().std()) == pytest.approx(
        lm.inner.config.initializer_range, rel=4 / np.sqrt(2 * weight.numel())
    )


def test_other_keys_are_uniform_over_the_other_keys_that_a_query_sees() -> None:
    table = torch.tensor([-1, 0, 1, -1, 2])
    drawn = torch.stack([other_keys(table, [seed]) for seed in range(3000)]).numpy()
    assert (drawn[:, [0, 3]] == -1).all()
    for query, target in ((1, 0), (2, 1), (4, 2)):
        others = [key for key in range(query + 1) if key != target]
        counts = np.bincount(drawn[:, query], minlength=5)
        assert counts[others].sum() == 3000
        share = 1 / len(others)
        assert np.abs(counts[others] / 3000 - share).max() <= 4 * np.sqrt(share * (1 - share) / 3000)
    assert other_keys(torch.tensor([-1]), [0]).tolist() == [-1]


def test_shuffled_targets_are_the_mass_on_random_keys(lm: LanguageModel) -> None:
    """Against eager attention in float64. Float32 softmax weights are off by some eps times the logits' size: 1e-5."""
    method = heads.METHODS["induction"](length=12, samples=3, seed=4)
    found = null(method, lm, "targets", seeds=(7, 8), progress=False)
    model = copy.deepcopy(lm.inner).double()
    model.set_attn_implementation("eager")
    for seed, scores in zip(found.seeds, found.scores, strict=True):
        for index, sample in enumerate(method.prepare(lm)):
            keys = other_keys(method.target(sample.ids), [seed, index]).numpy()
            asked = np.flatnonzero(keys >= 0)
            with torch.no_grad():
                pattern = torch.cat(model(sample.ids[None], output_attentions=True).attentions).numpy()
            np.testing.assert_allclose(scores.trials[index], pattern[:, :, asked, keys[asked]].mean(-1), atol=1e-5)
        assert scores.provenance["parameters"]["shuffled"] == seed
    observed = discover([method], lm, progress=False)[0]
    assert "shuffled" not in observed.provenance["parameters"]
    assert np.abs(observed.trials - found.scores[0].trials).max() > 1e-3
    assert np.abs(found.scores[1].trials - found.scores[0].trials).max() > 1e-3


def test_even_attention_scores_as_its_null(lm: LanguageModel) -> None:
    """A model without queries attends evenly: 1 / (i + 1) on any key, the target or another."""
    with torch.no_grad():
        for layer in lm.inner.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    method = heads.METHODS["previous_token"](length=6, samples=2, bos=False)
    expected = np.mean(1 / np.arange(2, 13))
    for one in (discover([method], lm, progress=False)[0], *null(method, lm, "targets", progress=False).scores):
        np.testing.assert_allclose(one.mean, expected, rtol=1e-6)


def test_random_weights_are_scored_by_any_method(lm: LanguageModel) -> None:
    method = heads.METHODS["previous_token"](length=10, samples=2)
    found = null(method, lm, seeds=(0, 1), progress=False)
    direct = discover([method], random_twin(lm, 1), progress=False)[0]
    np.testing.assert_array_equal(found.scores[1].trials, direct.trials)
    assert found.scores[0].details == direct.details and "random weights, seed 1" in direct.provenance["model"]["name"]
    mean = float(np.mean(1 / np.arange(2, 21)))  # nearly even attention: weights of 0.02 give logits far below 1
    assert found.scores[0].mean.mean() == pytest.approx(mean, rel=0.05)
    assert len(repr(found)) < 100


def test_heads_above_a_null_are_counted() -> None:
    base = np.arange(100.0).reshape(1, 10, 10)
    found = Null("weights", (0, 1), (HeadScores("m", base / 100), HeadScores("m", base / 200)))
    values = np.full((1, 10, 10), 0.2)
    values[0, 0, :3], values[0, 1, 0], values[0, 2, 0] = 0.97, 0.995, np.nan
    values[0, 3, :2] = -0.1
    told = found.against(HeadScores("m", values))
    assert found.highest == 0.99 and told["above_highest"] == 1 and told["heads"] == 99
    assert told["null_lowest"] == 0.0 and told["below_lowest"] == 2
    every = np.concatenate([base.ravel() / 100, base.ravel() / 200])
    assert told["null_quantile"] == pytest.approx(np.quantile(every, 0.95)) == pytest.approx(0.8905, abs=0.01)
    assert told["above_quantile"] == 4 and told["by_chance"] == pytest.approx(0.05 * 99)


def test_a_method_without_a_null_says_so(lm: LanguageModel) -> None:
    for kind, seeds, says in (("targets", (0,), "sinks has no null of kind 'targets'"), ("weights", (), "0 seeds")):
        with pytest.raises(HeadscopeError, match=says):
            null(heads.METHODS["sinks"](), lm, kind, seeds=seeds)


@pytest.mark.slow
def test_induction_heads_of_a_real_model_stand_above_both_nulls(smollm2) -> None:
    method = heads.METHODS["induction"](length=15, samples=2)
    observed = discover([method], smollm2, progress=False)[0]
    for kind in ("weights", "targets"):
        told = null(method, smollm2, kind, seeds=(0,), progress=False).against(observed)
        assert 5 < told["above_highest"] < 135  # some heads, not most
