"""Sorting heads by their features: standardise, cluster, name, and ask whether other prompts give the same clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from headscope.interp.errors import HeadscopeError

Method = Literal["kmeans", "agglomerative"]
FEWEST, MOST = 3, 12  # clusters among which the silhouette chooses: two are always best, and say the least
DISTINCT = 0.5  # standard deviations from the mean of all heads, from which a cluster is named after a feature
ALIKE = 0.8  # a correlation over heads from which two features say the same of a cluster
Labels = NDArray[np.int64]  # (head,)
Features = NDArray[np.float64]  # (head, feature)


@dataclass(frozen=True)
class Stability:
    """Adjusted Rand index (1: the same clusters, 0: as alike as by chance) between clusterings, as (mean, low, high).

    ``resampled``: of texts drawn with replacement, against all texts; ``halves``: of two halves of the texts (as many
    texts fewer, so lower); ``null``: of one clustering against another's labels permuted over heads. ``low`` and
    ``high`` hold 95 % of the draws.
    """

    resampled: tuple[float, float, float]
    halves: tuple[float, float, float]
    null: tuple[float, float, float]
    draws: int


def standardised(features: Features) -> Features:
    """Each feature less its mean over heads, over its standard deviation; 0 for one that is the same in all heads, or
    that no text has (NaN)."""
    features = np.nan_to_num(features)
    spread = features.std(axis=0)
    constant = spread <= 1e-9 * np.abs(features).max(axis=0, initial=1e-12)  # rounding alone
    return np.asarray(np.where(constant, 0.0, (features - features.mean(axis=0)) / np.where(constant, 1.0, spread)))


def partition(x: Features, k: int, method: Method, seed: int) -> Labels:
    """Labels of ``k`` clusters of standardised features, the largest cluster first.

    ``kmeans`` takes the best of ten seeded starts; ``agglomerative`` merges what adds least variance (Ward).
    """
    if method == "agglomerative":
        found = AgglomerativeClustering(k).fit_predict(x)
    else:
        found = KMeans(k, n_init=10, random_state=seed).fit_predict(x)
    order = np.argsort(-np.bincount(found, minlength=k), kind="stable")
    return np.asarray(np.argsort(order, kind="stable")[found], dtype=np.int64)


def silhouettes(x: Features, method: Method, seed: int) -> dict[int, float]:
    """The mean silhouette (-1 to 1) of 2 to ``MOST`` clusters.

    Raises:
        HeadscopeError: too few heads, or heads that are all the same.
    """
    if len(x) < 3 or len(np.unique(x, axis=0)) < 3:
        raise HeadscopeError(f"{len(x)} heads, {len(np.unique(x, axis=0))} of them different, cannot be sorted: 3 can")
    top = min(MOST, len(np.unique(x, axis=0)) - 1)
    return {k: float(silhouette_score(x, partition(x, k, method, seed))) for k in range(2, top + 1)}


def chosen(scores: dict[int, float]) -> int:
    """The number of clusters with the highest silhouette, of ``FEWEST`` or more where there are heads enough."""
    return max((k for k in scores if k >= min(FEWEST, max(scores))), key=lambda k: scores[k])


def shuffled_silhouettes(x: Features, k: int, method: Method, seed: int, draws: int) -> NDArray[np.float64]:
    """Silhouettes of ``k`` clusters where every feature is permuted over heads for itself: heads that keep each
    feature's distribution, and nothing of how features go together."""
    rng = np.random.default_rng([seed, 2])
    mixed = (rng.permuted(x, axis=0) for _ in range(draws))
    return np.array([silhouette_score(one, partition(one, k, method, seed)) for one in mixed])


def stability(examples: NDArray[np.float64], k: int, method: Method, seed: int, draws: int) -> Stability | None:
    """How alike the clusters of other prompts are; ``examples`` (example, head, feature). None for a single text."""
    if len(examples) < 2:
        return None
    rng = np.random.default_rng([seed, 1])

    def clusters(chosen: NDArray[np.int64]) -> Labels:
        return partition(standardised(averaged(examples[chosen])), k, method, seed)

    whole, count = clusters(np.arange(len(examples))), len(examples)
    resampled, halves, null = [], [], []
    for _ in range(draws):
        other = clusters(rng.integers(0, count, count))
        resampled.append(adjusted_rand_score(whole, other))
        null.append(adjusted_rand_score(whole, rng.permutation(other)))
        mixed = rng.permutation(count)
        halves.append(adjusted_rand_score(clusters(mixed[: count // 2]), clusters(mixed[count // 2 :])))
    return Stability(_range(resampled), _range(halves), _range(null), draws)


def averaged(examples: NDArray[np.float64]) -> Features:
    """The mean over examples (head, feature), of a feature over the texts that have it; NaN where none has."""
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.asarray(np.nansum(examples, axis=0) / (~np.isnan(examples)).sum(axis=0))


def names(x: Features, labels: Labels, words: Sequence[tuple[str, str]]) -> list[str]:
    """A name for each cluster: the two features in which it is farthest from the mean of all heads, in words.

    A feature that goes with one already named (correlation over heads of 0.8 or more) is passed over; a cluster within
    half a standard deviation of the mean in everything is "average". Clusters that would share a name get further
    features, then numbers.
    """
    with np.errstate(invalid="ignore", divide="ignore"):  # constant features have no correlation
        alike = np.nan_to_num(np.abs(np.corrcoef(x.T))) >= ALIKE
    told = [_told(x[labels == c].mean(axis=0), alike, words) for c in range(labels.max() + 1)]
    found: list[str] = []
    for own in told:
        wanted = (", ".join(own[:n]) or "average" for n in range(2, max(2, len(own)) + 1))
        base = next((name for name in wanted if name not in found), ", ".join(own[:2]) or "average")
        number = 1 + sum(name == base or name.startswith(f"{base} (") for name in found)
        found.append(base if number == 1 else f"{base} ({number})")
    return found


def _told(centre: NDArray[np.float64], alike: NDArray[np.bool_], words: Sequence[tuple[str, str]]) -> list[str]:
    said: list[int] = []
    for i in np.argsort(-np.abs(centre), kind="stable"):
        if abs(centre[i]) >= DISTINCT and not any(alike[i, j] for j in said):
            said.append(int(i))
    return [words[i][0] if centre[i] > 0 else words[i][1] for i in said]


def medoid(x: Features, members: NDArray[np.int64]) -> int:
    """The member with the least sum of distances to the others."""
    own = x[members]
    return int(members[np.linalg.norm(own[:, None] - own[None], axis=-1).sum(axis=1).argmin()])


def check(method: str, k: int | None, heads: int, draws: int) -> None:
    """Refuse settings out of range."""
    if method not in get_args(Method):
        raise HeadscopeError(f"method={method!r}: choose 'kmeans' or 'agglomerative'")
    if k is not None and not 2 <= k < heads:
        raise HeadscopeError(f"clusters={k}: of {heads} heads make 2 to {heads - 1}")
    if draws < 1:
        raise HeadscopeError(f"draws={draws}: draw at least once")


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(np.mean(values)), float(low), float(high)
