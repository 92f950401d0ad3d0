"""One method on models of any shape: where in depth the scores are, since their heads do not correspond."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import ks_2samp

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.scores import HeadScores


def by_depth(scores: Sequence[HeadScores], names: Sequence[str], bins: int = 4) -> pd.DataFrame:
    """Scores of a method on several models, pooled by relative depth [OURS].

    A layer's depth is (layer + 1/2) / layers, in (0, 1), cut into ``bins`` of one width. One row a run and bin: run,
    depth_from, depth_to, heads (with a score), mean, median, quantile_95, highest, highest_head; NaN in a bin without
    heads. No interval: heads are not a sample of heads.

    Raises:
        HeadscopeError: two methods, or no bin.
    """
    if len({one.method for one in scores}) != 1 or len(names) != len(scores) or bins < 1:
        raise HeadscopeError("by_depth compares runs of one method, each with a name, in 1 bin or more")
    rows = []
    for name, one in zip(names, scores, strict=True):
        bin_of = ((np.arange(one.layers) + 0.5) / one.layers * bins).astype(int)
        for part in range(bins):
            inside = np.where((bin_of == part)[:, None], one.mean, np.nan)
            known = inside[~np.isnan(inside)]
            layer, head = np.unravel_index(np.nanargmax(inside), inside.shape) if len(known) else (-1, -1)
            rows.append(
                {
                    "method": one.method,
                    "run": name,
                    "depth_from": part / bins,
                    "depth_to": (part + 1) / bins,
                    "heads": len(known),
                    "mean": known.mean() if len(known) else np.nan,
                    "median": np.median(known) if len(known) else np.nan,
                    "quantile_95": np.quantile(known, 0.95) if len(known) else np.nan,
                    "highest": known.max() if len(known) else np.nan,
                    "highest_head": f"L{layer}H{head}" if len(known) else "",
                }
            )
    return pd.DataFrame(rows)


def distribution_distance(first: HeadScores, second: HeadScores) -> float:
    """The largest difference between the two models' cumulative distributions of scores over heads, from 0 to 1.

    The statistic of Kolmogorov and Smirnov without its p-value, which would take the heads for independent draws.
    """
    one, other = (run.mean[~np.isnan(run.mean)] for run in (first, second))
    return float(ks_2samp(one, other).statistic)
