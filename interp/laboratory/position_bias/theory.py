"""What masks and encodings alone do to the share of a row that comes from each input, in closed form.

Wu et al. 2025 (arXiv 2502.01951): with A^t the pattern of layer t, P^t = A^t ... A^0 is the cumulative context
probability, of t + 1 factors; P^t(z_i = j) is its element (i, j). ``headscope.interp.statistics.rollout.Rollout``
measures it of a model. Positions count from 0 here; the paper's count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def closed_pattern(length: int, *, mask: str, slope: float = 0.0, window: int = 1, prefix: int = 0) -> Tensor:
    """The pattern of a mask where every score is 0, (query, key), float64: uniform over what is seen.

    Causal attention has M_ij = 1 / (i + 1) at j <= i; with ``decay``, keys weigh e^(-slope distance).
    """
    at = torch.arange(length)
    away = at[:, None] - at[None, :]
    seen = (away >= 0) if mask != "full" else torch.ones_like(away, dtype=torch.bool)
    if mask == "window":
        seen &= away < window
    if mask == "prefix":
        seen |= at[None, :] < prefix
    weights = torch.exp(-slope * away.double()) if mask == "decay" else torch.ones(length, length, dtype=torch.float64)
    weights = torch.where(seen, weights, 0.0)
    return weights / weights.sum(1, keepdim=True)


def cumulative(patterns: Sequence[Tensor], residual: float = 0.0) -> Tensor:
    """P of patterns (query, key) from the first layer to the last; each becomes r + (1 - r) A of ``residual`` r."""
    total = torch.eye(len(patterns[0]), dtype=patterns[0].dtype)
    for each in patterns:
        total = residual * total + (1.0 - residual) * each @ total
    return total


def decayed(layers: int, distance: int, slope: float) -> float:
    """C(t + d, d) e^(-slope d), t = ``layers`` - 1: what P^t(z_i = i - d) of a decay mask is proportional to, far from
    the text's beginning. Exact for weights that are not normalised."""
    return math.comb(layers - 1 + distance, distance) * math.exp(-slope * distance)


def heaviest_distance(layers: int, slope: float) -> float:
    """x* = t / (e^slope - 1), t = ``layers`` - 1: ``decayed`` grows with distance up to it, then falls."""
    return (layers - 1) / math.expm1(slope)


def causal_bound(least: float, position: int, layers: int) -> float:
    """(1 - j eps)^t of the position j, counted from 0: with every visible weight at least eps = ``least``, P^t(z_i = j)
    is at most some constant times it, so that only the first position keeps its share."""
    return (1.0 - position * least) ** (layers - 1)


def window_layers(length: int, window: int) -> int:
    """ceil((N - 1) / (w - 1)): layers until the first position reaches the last; a window's rate is as many times as
    slow (the paper's exponent is t over twice that)."""
    return math.ceil((length - 1) / (window - 1))
