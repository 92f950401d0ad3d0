"""The sink metric of Gu et al. 2024 (arXiv 2410.10781), of a record of any attention variant."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.statistics import LogSumExp, SpanMass, Statistic


def sink_statistics(positions: int, length: int) -> list[Statistic]:
    """What ``received`` reads: the mass of each of the first ``positions`` tokens, and of all ``length`` of them."""
    spans = {str(k): (k, k + 1) for k in range(positions)} | {"text": (0, length)}
    return [SpanMass(spans), LogSumExp()]


def received(record: xr.Dataset, *, halves: bool = False) -> NDArray[np.float64]:
    """alpha_k = 1/(T - k) sum_{i >= k} A[i, k] (example, layer, head, k), and behind them what keys that are no token
    take (a learned key): the mean over queries of 1 - the mass of the text.

    Under a window the sum is divided by T - k as in the authors' code, also where fewer rows see the key.

    Args:
        record: of ``sink_statistics``.
        halves: heads stand in pairs, of positive and of negative weights: A is then |w| over the sum of both, each
            pattern weighed by its row's sum exp(logsumexp), as in the authors' metric.
    """
    order = ("example", "layer", "head", "query")
    mass = record["span_mass"].transpose(*order, "span").to_numpy().astype(np.float64)
    if halves:
        total = np.exp(record["logsumexp"].transpose(*order).to_numpy().astype(np.float64))[..., None]
        parts, sums = (x.reshape(*x.shape[:2], -1, 2, *x.shape[3:]) for x in (mass * total, total))
        mass = parts.sum(3) / sums.sum(3)
    keys = [mass[..., k:, k].mean(-1) for k in range(mass.shape[-1] - 1)]
    return np.stack([*keys, 1 - mass[..., -1].mean(-1)], -1)


def sink_rates(alpha: NDArray[np.float64], epsilon: float) -> NDArray[np.float64]:
    """Sink_k^eps: the percentage of (example, layer, head) whose alpha_k exceeds ``epsilon``, for every k."""
    return np.asarray(100 * (alpha > epsilon).mean(axis=(0, 1, 2)))
