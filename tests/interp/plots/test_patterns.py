"""The map of patterns holds the codes' distances."""

from __future__ import annotations

import numpy as np
import xarray as xr

from headscope.interp import plots
from headscope.interp.analysis.pattern_embedding import PatternEmbedding


def embedding(codes: np.ndarray) -> PatternEmbedding:
    held = xr.DataArray(codes, {"layer": [1, 3]}, ("layer", "head", "code"))
    error = xr.DataArray(np.arange(6.0).reshape(2, 3), {"layer": [1, 3]}, ("layer", "head"))
    return PatternEmbedding(held, held, {"autoencoder": 1.0, "pca": 2.0, "mean map": 4.0}, error, (0,))


def test_codes_in_a_plane_keep_their_distances() -> None:
    plane = np.random.default_rng(0).normal(size=(6, 2))
    turned = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0][:2]
    fig = plots.pattern_map(embedding((plane @ turned + 7).reshape(2, 3, 4)))
    points = fig.data[0]
    at = np.stack([points.x, points.y], 1)
    apart = [np.linalg.norm(x[:, None] - x[None], axis=-1) for x in (at, plane)]
    np.testing.assert_allclose(*apart, atol=1e-12)
    assert list(points.text) == ["L1H0", "L1H1", "L1H2", "L3H0", "L3H1", "L3H2"]
    assert list(points.marker.color) == [1, 1, 1, 3, 3, 3] and list(points.customdata) == list(range(6))
    assert "0.25" in fig.layout.title.subtitle.text and "0.50" in fig.layout.title.subtitle.text
    held = np.var(at, axis=0)
    assert f"{held[0] / held.sum():.0%}" in fig.layout.xaxis.title.text


def test_codes_of_one_number_lie_on_a_line() -> None:
    fig = plots.pattern_map(embedding(np.arange(6.0).reshape(2, 3, 1)))
    np.testing.assert_allclose(np.abs(np.diff(fig.data[0].x)), 1)
    assert not np.any(fig.data[0].y) and "100%" in fig.layout.xaxis.title.text
    same = plots.pattern_map(embedding(np.ones((2, 3, 2))))
    assert not np.any(same.data[0].x) and "0%" in same.layout.xaxis.title.text
