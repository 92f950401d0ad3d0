"""Which methods find the same heads of a model: rank correlation and shared top heads, each beside its own nulls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from headscope.interp.analysis.shuffles import Kind, orders, two_sided
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.multiple import holm
from headscope.interp.results.scores import HeadScores

Measure = Literal["spearman", "jaccard"]
# what is shuffled under each null, of a score of heads and of one of layers
NULLS: dict[str, tuple[Kind, Kind]] = {
    "within layers": ("within layers", "nothing"),
    "all heads": ("all heads", "whole layers"),
}
# of rows: what is shown first
ORDER = {name: place for place, name in enumerate(("jaccard", "spearman", *NULLS))}
TOP = 20
SHUFFLES, SHUFFLES_A_PAIR = 2000, 50


@dataclass(frozen=True, eq=False, repr=False)
class Agreement:
    """What ``agree`` found.

    ``values`` (method, layer, head) are the scores of the methods ``names``; ``left_out`` are the layers in which some
    head has no score by some method, which count nowhere. ``pairs`` is the table of ``to_frame``.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]
    pairs: pd.DataFrame
    k: int
    left_out: tuple[int, ...]
    permutations: int
    seed: int

    def __repr__(self) -> str:
        best = self.pairs[self.pairs["measure"] == "jaccard"].sort_values("shared", ascending=False).iloc[0]
        closest = f"{best['a']!r:.24} and {best['b']!r:.24} share {best['shared']:g} of their top {self.k}"
        return f"Agreement({len(self.names)} methods, {self.heads} heads, {closest})"

    @property
    def heads(self) -> int:
        """How many heads were compared."""
        return len(self._kept()) * int(self.values.shape[2])

    def to_frame(self) -> pd.DataFrame:
        """One row a pair, measure (spearman, jaccard) and null (within layers, all heads).

        Columns: a, b, measure, null, observed, null_mean, null_low, null_high (95 % of the shuffles lie between), p
        (two-sided), p_holm (over the pairs of a measure and null), shared (heads in both top k).
        """
        return self.pairs.copy()

    def renamed(self, names: Sequence[str]) -> Agreement:
        """The same under other names, as for a reader."""
        new = dict(zip(self.names, names, strict=True))
        return replace(
            self, names=tuple(names), pairs=self.pairs.assign(a=self.pairs["a"].map(new), b=self.pairs["b"].map(new))
        )

    def matrix(self, measure: Measure) -> pd.DataFrame:
        """The observed measure of every two methods, 1 on the diagonal."""
        found = pd.DataFrame(np.eye(len(self.names)), index=self.names, columns=self.names)
        for _, row in self.pairs[self.pairs["measure"] == measure].iterrows():
            found.loc[row["a"], row["b"]] = found.loc[row["b"], row["a"]] = row["observed"]
        return found

    def top(self, name: str) -> HeadSet:
        """A method's ``k`` highest heads among those compared; fewer where others tie for the last places."""
        kept, heads = self._kept(), self.values.shape[2]
        scores = self.values[self.names.index(name), kept].ravel()
        best = np.argsort(-scores, kind="stable")[: self.k]
        best = best[members(scores[None], self.k)[0, best] == 1]
        pairs = tuple((int(kept[i // heads]), int(i % heads)) for i in best)
        return HeadSet(pairs, tuple(float(scores[i]) for i in best), f"{name} top {self.k}")

    def shared(self, a: str, b: str) -> HeadSet:
        """The heads that are in the top k of both for sure, in ``a``'s order."""
        return self.top(a) & self.top(b)

    def shared_names(self) -> dict[str, list[str]]:
        """The heads that every two methods share, ``{"induction & sinks": ["L3H4"]}``."""
        pairs = combinations(self.names, 2)
        return {f"{a} & {b}": [f"L{layer}H{head}" for layer, head in self.shared(a, b)] for a, b in pairs}

    def ranks(self, each: int = 5) -> pd.DataFrame:
        """The ``each`` best heads of every method with their rank (1 the highest) by all methods; ties share one."""
        kept = self._kept()
        flat = self.values[:, kept].reshape(len(self.names), -1)
        ranks = rankdata(-flat, method="min", axis=1).astype(int)
        chosen = np.flatnonzero((ranks <= each).any(axis=0))
        chosen = chosen[np.lexsort((ranks[:, chosen].sum(axis=0), ranks[:, chosen].min(axis=0)))]
        layer, head = kept[chosen // self.values.shape[2]], chosen % self.values.shape[2]
        frame = pd.DataFrame({"head": [f"L{x}H{y}" for x, y in zip(layer, head, strict=True)]})
        return frame.assign(**{name: row[chosen] for name, row in zip(self.names, ranks, strict=True)})

    def _kept(self) -> NDArray[np.int64]:
        return np.setdiff1d(np.arange(self.values.shape[1]), self.left_out)


def agree(
    scores: Sequence[HeadScores],
    *,
    names: Sequence[str] | None = None,
    k: int | None = None,
    permutations: int | None = None,
    seed: int = 0,
) -> Agreement:
    """Whether methods rank the heads of a model alike, and share their best ones, more than shuffled scores would.

    For every two methods Spearman's rank correlation over heads, and the Jaccard index of their ``k`` highest heads
    (where several heads tie for the last places, these are drawn by lot, and the number shared is its mean [OURS]: a
    sparse method, with 0 for most heads, has no k best ones). Each stands beside two permutation nulls [OURS; no paper
    fixes one]: one method's scores are shuffled *within layers*, so that what two methods share through depth alone
    (both high in late layers) is part of the null, or over *all heads*. A null has a mean, a 95 % interval and a
    two-sided p, which Holm's method adjusts over the pairs. Without depth, k^2 / heads shared heads are expected of
    chance.

    Of a method whose score is its layer's (``provenance["per"]``), whole layers are shuffled instead of all heads, for
    its heads are not so many observations; within layers there is nothing to shuffle, and p is 1.

    What it does not show: that two methods measure the same (previous-token heads and a sink share whatever the text
    makes them share), or agreement in other models; scores that are noisy agree less than what they estimate
    (``split_half``). Low scores count like high ones in the correlation: of most methods they are noise.

    Args:
        scores: of one model, or of models whose heads correspond (checkpoints of one run).
        names: what to call them (default: their methods).
        k: how many of the highest heads are compared; by default 20, and at most a quarter of the heads.
        permutations: shuffles of each null; no p is below 2 / (1 + permutations), so by default 2,000, and 50 a pair
            where that is more: with fewer no p that is adjusted over all pairs could be small.
        seed: of the shuffles.

    Raises:
        HeadscopeError: fewer than two, two of one name, other shapes, no layer that all score, ``k`` or
            ``permutations`` out of range.
    """
    names = tuple(names or (one.method for one in scores))
    values, left_out = _common(scores, names)
    layers, heads = values.shape[1] - len(left_out), values.shape[2]
    k = min(TOP, max(1, layers * heads // 4)) if k is None else k
    if not 0 < k < layers * heads:
        raise HeadscopeError(f"k={k}: of {layers * heads} heads compare the top 1 to {layers * heads - 1}")
    flat = np.delete(values, left_out, axis=1).reshape(len(names), -1)
    pairs = len(names) * (len(names) - 1) // 2
    permutations = max(SHUFFLES, SHUFFLES_A_PAIR * pairs) if permutations is None else permutations
    if permutations < 1:
        raise HeadscopeError(f"permutations={permutations}: a null takes at least 1 shuffle")
    ranks, top = _standard_ranks(flat), members(flat, k)
    per_layer = [one.provenance.get("per") == "layer" for one in scores]
    rows = []
    for null, kinds in NULLS.items():
        shuffles = [orders(kind, layers, heads, permutations, np.random.default_rng(seed)) for kind in kinds]
        for a, b in combinations(range(len(names)), 2):
            moved, still = (b, a) if per_layer[b] and not per_layer[a] else (a, b)
            order = shuffles[per_layer[moved]]
            shared, drawn = (np.round(x @ top[still], 9) for x in (top[moved], top[moved][order]))  # equal are equal
            both = {"a": names[a], "b": names[b], "null": null, "shared": round(float(shared), 1)}
            rows.append(both | {"measure": "jaccard"} | _against(_jaccard(shared, k), _jaccard(drawn, k)))
            correlations = ranks[moved][order] @ ranks[still]
            rows.append(both | {"measure": "spearman"} | _against(float(ranks[a] @ ranks[b]), correlations))
    return Agreement(names, values, _table(rows), k, left_out, permutations, seed)


def _common(scores: Sequence[HeadScores], names: Sequence[str]) -> tuple[NDArray[np.float64], tuple[int, ...]]:
    """Scores (method, layer, head), and the layers in which a head is without one."""
    if len(scores) < 2 or len(set(names)) < len(scores) or len(names) != len(scores):
        raise HeadscopeError(f"agreement needs two or more scores, each with a name of its own; got {', '.join(names)}")
    shapes = {one.mean.shape for one in scores}
    if len(shapes) > 1:
        listed = " and ".join(f"{layers} x {heads}" for layers, heads in sorted(shapes))
        raise HeadscopeError(f"{listed} heads do not correspond; compare scores of models of one shape")
    values = np.stack([one.mean for one in scores])
    left_out = np.flatnonzero(np.isnan(values).any(axis=(0, 2)))
    if len(left_out) == values.shape[1]:
        raise HeadscopeError(f"no layer has a score of every head by all of {', '.join(names)}, so nothing is compared")
    return values, tuple(int(layer) for layer in left_out)


def _standard_ranks(flat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks of rows, centred and of length 1, so that a product is Spearman's correlation; NaN where all are equal."""
    ranks = rankdata(flat, axis=1) - (flat.shape[1] + 1) / 2
    with np.errstate(invalid="ignore"):
        return np.asarray(ranks / np.linalg.norm(ranks, axis=1, keepdims=True))


def members(flat: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """1 for the ``k`` highest of each row, else 0; those that tie for the last places have an equal share of them."""
    last = np.sort(flat, axis=1)[:, -k, None]
    above, level = flat > last, flat == last
    share = (k - above.sum(axis=1, keepdims=True)) / level.sum(axis=1, keepdims=True)
    return np.asarray(above + level * share)


def _jaccard(shared: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    return np.asarray(shared / (2 * k - shared))


def _against(observed: float | NDArray[np.float64], drawn: NDArray[np.float64]) -> dict[str, float]:
    observed = float(observed)
    low, high = (np.nan, np.nan) if np.isnan(observed) else np.percentile(drawn, [2.5, 97.5])
    told = {"observed": observed, "null_mean": float(drawn.mean()), "null_low": float(low), "null_high": float(high)}
    return told | {"p": two_sided(observed, drawn)}


def _table(rows: Sequence[dict[str, object]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    family = frame.groupby(["measure", "null"], sort=False)["p"]
    frame["p_holm"] = family.transform(lambda p: holm(p.to_numpy()))
    columns = ["a", "b", "measure", "null", "observed", "null_mean", "null_low", "null_high", "p", "p_holm", "shared"]
    return frame[columns]


def closest_first(pairs: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``to_frame`` for a reader: by measure and null, and in each of these those that agree most first."""
    ranked = pairs.sort_values("observed", ascending=False, kind="stable")
    return ranked.sort_values(["measure", "null"], key=lambda names: names.map(ORDER), kind="stable", ignore_index=True)


def found_alike(found: Agreement) -> Iterator[str]:
    """One sentence for every pair that shares more top heads than the null within layers, as for a reader."""
    rows = found.pairs[(found.pairs["measure"] == "jaccard") & (found.pairs["null"] == "within layers")]
    for _, row in rows[(rows["p_holm"] < 0.05) & (rows["observed"] > rows["null_mean"])].iterrows():
        yield (
            f"{row['a']} and {row['b']} share {row['shared']:g} of their top {found.k} heads "
            f"(Jaccard {row['observed']:.2f}; {row['null_mean']:.2f} on average when shuffled within layers, "
            f"Holm-adjusted p {row['p_holm']:.2g})"
        )
