"""Concentric diagnostics: whether text looks at a picture by the order of its tokens or by their place in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.picture_values import PictureValues


def ring_table(maps: Sequence[PictureValues]) -> pd.DataFrame:
    """What each ring of the grid receives, by layer: the mean over maps and heads.

    Xing et al. 2024, "Mitigating Object Hallucination via Concentric Causal Attention" (arXiv 2410.15926): rotary
    positions put the last rows of a picture nearest to the text, which looks at them more than at the first; concentric
    positions would go by ``ring``, 0 at the border. Columns: layer, ring, cells (of it), mass (a cell's), lift (mass
    over the mean of all cells). What it does not show: whether the middle holds what is asked for.
    """
    rows = []
    for layer, value, rings in _by_layer(maps):
        for ring in np.unique(rings):
            own, mean = float(value[rings == ring].mean()), float(value.mean())
            facts = {"layer": layer, "ring": int(ring), "cells": int((rings == ring).sum()), "mass": own}
            rows.append({**facts, "lift": own / mean if mean > 0 else np.nan})
    found = pd.DataFrame(rows)
    return found.groupby(["layer", "ring"], as_index=False).mean()


def order_table(maps: Sequence[PictureValues]) -> pd.DataFrame:
    """Rank correlations of attention with where a cell stands, by layer, the mean over maps: ``raster``, its place in
    the order of tokens; ``row``; ``column``; ``ring``. Raster order and rows rise together: a recency trend shows in
    both, a taste for the middle in ring alone."""
    rows = []
    for layer, value, rings in _by_layer(maps):
        at: NDArray[Any] = np.indices(value.shape)
        places: dict[str, NDArray[Any]] = {"row": at[0], "column": at[1], "ring": rings}
        places["raster"] = np.arange(value.size).reshape(value.shape)
        with np.errstate(invalid="ignore"):
            found = {name: float(spearmanr(value.ravel(), one.ravel()).statistic) for name, one in places.items()}
        rows.append({"layer": layer, **found})
    return pd.DataFrame(rows).groupby("layer", as_index=False).mean()


def _by_layer(maps: Sequence[PictureValues]) -> list[tuple[int, NDArray[np.float64], NDArray[np.int64]]]:
    if not maps or any("layer" not in one.values.dims for one in maps):
        raise HeadscopeError("give maps of layers, as image_attention makes them")
    found = []
    for one in maps:
        mean = one.values.mean([dim for dim in one.values.dims if dim not in ("layer", "row", "column")])
        for layer in mean["layer"].to_numpy().tolist():
            found.append((layer, mean.sel(layer=layer).to_numpy().astype(np.float64), one.grid.rings))
    return found
