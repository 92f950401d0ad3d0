"""Codes of pooled maps: maps against eager weights, maps with a known code, principal components by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import spearmanr

from headscope.interp.analysis.pattern_embedding import embed_patterns, pooled_maps
from headscope.interp.errors import HeadscopeError

DIMS = ("example", "layer", "head", "query_block", "key_block")


def test_maps_are_pooled_eager_weights(worded, words, dense) -> None:
    """float32 weights, 1e-6 each, of which a block of 4 keys holds four."""
    found = pooled_maps(worded, words, length=32, side=8)
    assert found.dims == DIMS and found.shape == (6, 2, 4, 8, 8)
    _, weights = dense(worded, words, 32)
    wanted = weights.reshape(6, 2, 4, 8, 4, 8, 4).sum(-1).mean(-2)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-6)
    assert (found.to_numpy()[..., *np.triu_indices(8, 1)] == 0).all()
    np.testing.assert_allclose(found.sum("key_block"), 1, atol=1e-5)


def line(side: int = 10) -> tuple[xr.DataArray, np.ndarray]:
    """Maps between a diagonal and a first column, as far as a number a head says: (example, layer, head, ...)."""
    ends = np.eye(side), np.eye(side)[np.zeros(side, dtype=int)]
    share = np.random.default_rng(0).uniform(0, 1, (4, 6, 8))
    share[:] = share[:1]  # a head's own in every text
    values = share[..., None, None] * ends[0] + (1 - share[..., None, None]) * ends[1]
    return xr.DataArray(values, {"layer": np.arange(6)}, DIMS), share[0]


def test_maps_on_a_line_have_a_code_of_one_number() -> None:
    """Principal components are exact here; the network is trained, so it is asked for a twentieth of the variance."""
    maps, share = line()
    found = embed_patterns(maps, width=1, steps=300)
    assert found.unexplained("pca") < 1e-20 and found.unexplained("autoencoder") < 0.05
    for codes in (found.codes, found.pca):
        assert codes.shape == (6, 8, 1)
        assert abs(spearmanr(codes.to_numpy().ravel(), share.ravel()).statistic) > 0.99
    frame = found.to_frame()
    assert list(frame) == ["layer", "head", "code_0", "pca_0", "error"] and len(frame) == 48
    assert frame["error"].mean() == pytest.approx(found.error["autoencoder"])
    assert "width 1" in repr(found)


def test_components_are_those_of_the_texts_that_are_kept() -> None:
    rng = np.random.default_rng(2)
    maps = line()[0] + 0.1 * rng.standard_normal((4, 6, 8, 10, 10))
    found = embed_patterns(maps, width=3, steps=1)
    kept = [i for i in range(4) if i not in found.held_out]
    known = maps.to_numpy()[kept].reshape(-1, 100)
    new = maps.to_numpy()[list(found.held_out)].reshape(-1, 100)
    axes = np.linalg.svd(known - known.mean(0), full_matrices=False)[2][:3]
    centred = new - known.mean(0)
    rest = centred - centred @ axes.T @ axes
    assert len(kept) == 2 and found.error["pca"] == pytest.approx((rest**2).mean(), rel=1e-9)
    assert found.error["mean map"] == pytest.approx((centred**2).mean(), rel=1e-9)


def test_a_seed_decides_and_torchs_generator_is_left_alone() -> None:
    maps, _ = line()
    before = torch.get_rng_state()
    one, two, other = (embed_patterns(maps, width=2, steps=5, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    xr.testing.assert_identical(one.codes, two.codes)
    assert not one.codes.equals(other.codes)


@pytest.mark.parametrize("side", [4, 5, 7, 14])
def test_every_side(side: int) -> None:
    found = embed_patterns(line(side)[0], width=2, steps=2)
    assert np.isfinite(found.codes).all()


def test_bad_input_is_one_line(worded, words) -> None:
    maps, _ = line()
    for given, said in (
        ({"maps": maps.isel(example=[0])}, "at least two"),
        ({"maps": maps.where(maps != 1)}, "not a number"),
        ({"maps": line(20)[0]}, "4 to 14"),
        ({"maps": maps.isel(key_block=slice(5))}, "10 x 5"),
        ({"maps": maps[0]}, "dimensions"),
        ({"maps": maps, "width": 0}, "width=0"),
    ):
        with pytest.raises(HeadscopeError, match=said) as error:
            embed_patterns(**given)
        assert "\n" not in str(error.value)
    for length, side in ((30, 8), (30, 15), (6, 3)):
        with pytest.raises(HeadscopeError, match="blocks a side"):
            pooled_maps(worded, words, length=length, side=side)


@pytest.mark.slow
def test_smollm2_maps_of_other_texts_are_coded(smollm2) -> None:
    """A code of four numbers, learned from two texts, says most of what tells heads apart in two others."""
    found = embed_patterns(pooled_maps(smollm2, length=112, samples=4), steps=150)
    assert found.codes.shape == (30, 9, 4) and found.unexplained("pca") < 0.5 and found.unexplained("autoencoder") < 0.5
