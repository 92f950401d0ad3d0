"""Percentile bootstrap of means."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

HELD = 2**24  # draws held at a time


def bootstrap_mean(
    trials: NDArray[np.float64],
    groups: NDArray[np.int64] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile bootstrap interval of the mean over axis 0, resampling whole groups where given.

    Returns (low, high) with the shape of one trial; NaN for a head that fewer than two trials (or groups) say something
    about. NaN entries are left out of a head's mean. The resampling is multinomial weights times the per-group sums,
    which is the same bootstrap as drawing rows, in one matrix product.
    """
    means = resampled_means(trials, groups, resamples=resamples, seed=seed)
    return percentile_interval(means, level)


def resampled_means(
    trials: NDArray[np.float64],
    groups: NDArray[np.int64] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """The means behind ``bootstrap_mean``: (resample, ...), NaN for a head without an interval."""
    flat = trials.reshape(len(trials), -1)
    labels = np.arange(len(trials)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(labels.max()) + 1
    sums, sizes = np.zeros((count, flat.shape[1])), np.zeros((count, flat.shape[1]))
    np.add.at(sums, labels, np.nan_to_num(flat))
    np.add.at(sizes, labels, ~np.isnan(flat))
    means = np.full((resamples, flat.shape[1]), np.nan)
    known = (sizes > 0).sum(axis=0) >= 2
    if known.any():
        drawn = stats.multinomial(count, np.full(count, 1.0 / count), seed=np.random.default_rng(seed))
        step = max(1, HELD // count)
        for first in range(0, resamples, step):
            draws = np.atleast_2d(drawn.rvs(min(step, resamples - first)))
            with np.errstate(invalid="ignore", divide="ignore"):
                means[first : first + step, known] = (draws @ sums[:, known]) / (draws @ sizes[:, known])
    return means.reshape(resamples, *trials.shape[1:])


def percentile_interval(means: NDArray[np.float64], level: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The bounds between which ``level`` of resampled means (resample, ...) lie, NaN left out; NaN without any."""
    flat = means.reshape(len(means), -1)
    low, high = np.full(flat.shape[1], np.nan), np.full(flat.shape[1], np.nan)
    known = ~np.isnan(flat).all(axis=0)
    tail = 50.0 * (1.0 - level)
    if known.any():
        low[known], high[known] = np.nanpercentile(flat[:, known], [tail, 100.0 - tail], axis=0)
    return low.reshape(means.shape[1:]), high.reshape(means.shape[1:])
