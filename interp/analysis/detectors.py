"""Whether the kinds of heads that a taxonomy finds are those that head methods find."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from headscope.interp.analysis.taxonomy import Taxonomy
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.scores import HeadScores


def detected(found: Taxonomy, scores: Sequence[HeadScores], *, permutations: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How the scores of head methods go with the clusters: one row a method and cluster. [OURS]

    Columns: method, cluster, name, heads, ``mean`` score of the cluster's heads, ``auc`` (the chance that a head of the
    cluster scores above one outside it: 1 above all, 0.5 no difference), and, the same for all rows of a method,
    ``eta_squared``, the share of the scores' variance over heads that lies between clusters, with ``null_mean`` and
    ``null_high`` (mean and 95 % quantile where labels are permuted over heads) and ``p`` (one-sided; at least
    1 / (1 + permutations)). NaN where all heads score the same. Heads without a score are left out.

    What it does not show: agreement beyond what both see; a method that measures one of the features (induction, sinks)
    agrees because that feature was clustered by.

    Raises:
        HeadscopeError: scores of a model with other layers or heads, or none at all for some method.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for one in scores:
        values, labels = _compared(found, one)
        share = _between(values, labels)
        drawn = np.array([_between(values, rng.permutation(labels)) for _ in range(permutations)])
        reached = int((drawn >= share - 1e-12).sum())  # a permutation that changes nothing rounds otherwise
        p = np.nan if np.isnan(share) else (1 + reached) / (1 + permutations)
        whole = {"eta_squared": share, "null_mean": drawn.mean(), "null_high": np.quantile(drawn, 0.95), "p": p}
        for c, cluster in enumerate(found.clusters):
            own = labels == c
            told = {"method": one.method, "cluster": c, "name": cluster.name, "heads": int(own.sum())}
            mean = float(values[own].mean()) if own.any() else np.nan
            auc = float(roc_auc_score(own, values)) if 0 < own.sum() < len(own) else np.nan
            rows.append({**told, "mean": mean, "auc": auc, **whole})
    return pd.DataFrame(rows)


def _compared(found: Taxonomy, scores: HeadScores) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores and labels of the heads that have both."""
    layers = found.features["layer"].to_numpy()
    if layers.max() >= scores.layers or found.labels.shape[1] != scores.heads:
        raise HeadscopeError(
            f"{scores.method} scores {scores.layers} x {scores.heads} heads, the taxonomy has layers up to "
            f"{layers.max()} of {found.labels.shape[1]} heads: give scores of the same model"
        )
    values, labels = scores.mean[layers].ravel(), found.labels.ravel()
    has = ~np.isnan(values)
    if not has.any():
        raise HeadscopeError(f"{scores.method} has no score for any head of the taxonomy's layers")
    return values[has], labels[has]


def _between(values: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Eta squared: the sum of squares between clusters over the whole."""
    if values.min() == values.max():
        return float("nan")
    total = ((values - values.mean()) ** 2).sum()
    count = np.bincount(labels)
    means = np.bincount(labels, weights=values) / np.maximum(count, 1)
    return float((count * (means - values.mean()) ** 2).sum() / total)
