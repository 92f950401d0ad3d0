"""Recency: the exponential trend of what keys receive over their position, and values without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError

STEEPEST = 50.0  # a trend by more than e^50 from end to end is a spike at one of them
GOLDEN = (np.sqrt(5.0) - 1.0) / 2.0
Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RecencyTrend:
    """f(x) = ``mu`` exp(``sigma`` x) over x = i / (n - 1), each (...), fitted to values (..., n).

    ``sigma`` above 0: later keys receive more. NaN: there is no such trend (values that are 0, or a spike at an end).
    ``r2``: the share of the values' variance that the trend explains.
    """

    mu: Values
    sigma: Values
    r2: Values

    def __call__(self, count: int) -> Values:
        """The trend at ``count`` keys: (..., count)."""
        return np.asarray(self.mu[..., None] * np.exp(self.sigma[..., None] * _places(count)))

    def weights(self, count: int) -> Values:
        """What takes it away: f(0) / f(x), 1 for the first key (..., count); 1 throughout where there is no trend."""
        sigma = np.nan_to_num(self.sigma[..., None])
        return np.asarray(np.exp(-sigma * _places(count)))


def recency_trend(values: Any) -> RecencyTrend:
    """Fit the recency trend of Zhao et al. 2025 (arXiv 2508.17807) to what keys receive, ``values`` (..., n).

    By least squares on the values themselves, not on their logarithm [OURS: the fitting script is not published]; with
    x = i / (n - 1), as in the weights that are (the paper writes i / n). The paper fits the mean over heads of
    attention from text to the tokens of an image; any profile will do, such as ``profile.received_profile`` of every
    head. ``remove_trend`` divides by the trend.

    Raises:
        HeadscopeError: fewer than three keys, or values that are negative or not numbers.
    """
    a = np.asarray(values, dtype=np.float64)
    if a.shape[-1] < 3 or not np.isfinite(a).all() or (a < 0).any():
        raise HeadscopeError("a trend is fitted to at least three keys, whose attention is a number from 0 on")
    x = _places(a.shape[-1])
    grid = np.linspace(-STEEPEST, STEEPEST, 401)
    shapes = _shapes(grid, x)
    fits = (a @ shapes.T) ** 2 / (shapes**2).sum(-1)  # of each slope, with its best height: the larger the better
    best = grid[fits.argmax(-1)]
    sigma = _refined(a, x, best - 0.25, best + 0.25)
    lost = (a.max(-1) <= 0) | (np.abs(sigma) > STEEPEST - 0.25)
    shape = _shapes(sigma, x)
    # the shape's largest value is 1; mu is the trend at x = 0
    height = (a * shape).sum(-1) / (shape**2).sum(-1)
    mu = height * np.exp(-np.maximum(sigma, 0.0))
    spread = ((a - a.mean(-1, keepdims=True)) ** 2).sum(-1)
    rest = ((a - height[..., None] * shape) ** 2).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        r2 = np.where(spread > 0, 1.0 - rest / spread, np.nan)
    return RecencyTrend(*(np.where(lost, np.nan, one) for one in (mu, sigma, r2)))


def remove_trend(values: Any, trend: RecencyTrend) -> Values:
    """``values`` (..., n) times f(0) / f(x): what keys would receive were all as recent as the first."""
    a = np.asarray(values, dtype=np.float64)
    return np.asarray(a * trend.weights(a.shape[-1]))


def _places(count: int) -> Values:
    return np.arange(count) / max(1, count - 1)


def _shapes(sigma: Values, x: Values) -> Values:
    """exp(sigma x) with 1 as its largest value: (..., n)."""
    return np.asarray(np.exp(sigma[..., None] * x - np.maximum(sigma, 0.0)[..., None]))


def _refined(a: Values, x: Values, low: Values, high: Values) -> Values:
    """The best slope between bounds (...), by golden section: the fit has one top near the grid's best."""

    def fit(sigma: Values) -> Values:
        shape = _shapes(sigma, x)
        return np.asarray((a * shape).sum(-1) ** 2 / (shape**2).sum(-1))

    for _ in range(50):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        up = fit(left) > fit(right)
        low, high = np.where(up, low, left), np.where(up, right, high)
    return np.asarray((low + high) / 2)
