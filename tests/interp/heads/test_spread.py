"""Entropy and effective context against eager weights in float64, and where they are known.

Tolerance: an entropy is a sum of 20 terms p log p, each off by about eps (1.2e-7) times scores of about 10, two layers
deep: 1e-4; exp of it, up to 20 keys: 20 times that.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headscope.interp import heads, trace
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics import Entropy

NEAR = 1e-4
QUIET = {"progress": False}


def entropy(pattern: np.ndarray) -> np.ndarray:
    return -(pattern * np.log(np.where(pattern > 0, pattern, 1.0))).sum(-1)


def test_scores_are_those_of_eager_weights(grouped, texts, eager, ids_of) -> None:
    rows = entropy(eager(grouped, ids_of(grouped, texts, 20)))[..., -6:]  # five scored tokens and the one before
    options = dict(texts=texts, length=20, scored=5, batch=3, **QUIET)
    np.testing.assert_allclose(heads.attention_entropy(grouped, **options).trials, rows.mean(-1), rtol=0, atol=NEAR)
    effective = np.exp(rows).mean(-1)
    found = heads.effective_context(grouped, **options)
    np.testing.assert_allclose(found.trials, effective, rtol=0, atol=20 * NEAR)
    assert abs(effective - np.exp(rows.mean(-1))).max() > 0.1  # the mean of exp is not exp of the mean


def test_the_fewest_keys_against_sorted_eager_weights(grouped, texts, eager, ids_of) -> None:
    rows = np.sort(eager(grouped, ids_of(grouped, texts, 20))[..., -6:, :], -1)[..., ::-1].cumsum(-1)
    assert np.abs(rows - 0.8).min() > 1e-5  # no row so near that float32 could take it for another
    wanted = ((rows < 0.8).sum(-1) + 1).mean(-1)
    found = heads.head_sparsity(grouped, texts=texts, length=20, scored=5, batch=3, share=0.8, **QUIET)
    np.testing.assert_allclose(found.trials, wanted, rtol=1e-6)
    with pytest.raises(HeadscopeError, match="above 0 and at most 1"):
        heads.head_sparsity(grouped, share=1.5, **QUIET)


def test_padding_on_either_side_changes_nothing(grouped, padded, eager) -> None:
    ids, mask, at = padded
    with trace(grouped, [Entropy()]) as tracer:
        grouped.model(ids, attention_mask=mask)
    for e, place in enumerate(at):
        want = entropy(eager(grouped, ids[e : e + 1, place])[0])
        found = tracer.record["entropy"][e].to_numpy()[..., : want.shape[-1]]
        np.testing.assert_allclose(found, want, rtol=0, atol=NEAR)


def test_uniform_attention_spreads_over_all_keys(grouped, texts) -> None:
    with torch.no_grad():
        for layer in grouped.model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    options = dict(texts=texts, length=9, scored=2, **QUIET)
    np.testing.assert_allclose(heads.effective_context(grouped, **options).mean, (7 + 8 + 9) / 3, rtol=1e-5)
    np.testing.assert_allclose(heads.attention_entropy(grouped, **options).mean, np.log([7, 8, 9]).mean(), rtol=1e-5)
    found = heads.head_sparsity(grouped, share=0.5, **options).mean  # 4, 4 and 5 of 7, 8 and 9 keys
    np.testing.assert_allclose(found, 13 / 3, rtol=1e-5)


@pytest.mark.parametrize("scored", [0, 512])
def test_bad_input(grouped, scored: int) -> None:
    with pytest.raises(HeadscopeError, match="fewer than the 512 tokens"):
        heads.attention_entropy(grouped, scored=scored, **QUIET)


@pytest.mark.slow
def test_smollm2s_sinks_are_narrow(smollm2) -> None:
    """A head that rests on one key has little entropy: the two measures rank heads against each other."""
    sinks = heads.sinks(smollm2, samples=4, **QUIET).mean.ravel()
    found = heads.effective_context(smollm2, samples=3, length=128, scored=32, **QUIET).mean.ravel()
    ranks = [np.argsort(np.argsort(x)) for x in (sinks, found)]
    assert np.corrcoef(*ranks)[0, 1] < -0.5 and 1 <= found.min() and found.max() < 128
