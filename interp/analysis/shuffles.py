"""Shuffles of a model's heads, and where an observed number lies among those that they give."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["within layers", "all heads", "whole layers", "nothing"]


def orders(kind: Kind, layers: int, heads: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """``count`` random orders of the heads of a model, flattened layer by layer: (count, layers * heads).

    "within layers": every layer's heads among themselves; "all heads": all of them; "whole layers": the layers, each
    with its heads as they are; "nothing": every order is the model's.
    """
    if kind == "nothing":
        return np.tile(np.arange(layers * heads), (count, 1))
    if kind == "whole layers":
        first = np.argsort(rng.random((count, layers)), axis=1) * heads
        return (first[:, :, None] + np.arange(heads)).reshape(count, layers * heads)
    floor = np.repeat(np.arange(layers), heads) if kind == "within layers" else np.zeros(layers * heads)
    return np.argsort(floor + rng.random((count, layers * heads)), axis=1)


def two_sided(observed: float, drawn: NDArray[np.float64]) -> float:
    """The Monte-Carlo probability of a draw as extreme as ``observed``: twice the smaller tail, at most 1.

    A tail is (1 + count) / (1 + draws), which counts the observation itself (Phipson and Smyth 2010, arXiv 1603.05766),
    so that none is below 2 / (1 + draws). Draws within 1e-12 of the observation count as equal to it.
    """
    if np.isnan(observed):
        return float("nan")
    above, below = (int((side >= -1e-12).sum()) for side in (drawn - observed, observed - drawn))
    return min(1.0, 2 * (1 + min(above, below)) / (1 + len(drawn)))
