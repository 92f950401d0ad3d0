"""Split-half reliability: whether a method's scores come out the same from one half of its trials as from the other."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from headscope.interp.analysis.agreement import TOP, members
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.scores import HeadScores


@dataclass(frozen=True)
class Reliability:
    """What ``split_half`` found: numbers between two halves of the trials, means over ``splits``.

    ``pearson`` and ``spearman`` are corrected to the full number of trials, ``half_pearson`` and ``half_spearman`` are
    of halves; ``low`` and ``high`` hold 95 % of the splits' corrected Pearson coefficients (a spread, no confidence
    interval: all splits divide the same trials). ``overlap`` is the share of the ``k`` highest heads of one half that
    are among those of the other (ties for the last places by lot), and ``overlap_by_chance`` what random heads share
    (k / heads). ``groups`` were divided, which hold ``trials``; NaN: every head has one and the same score.
    """

    method: str
    pearson: float
    low: float
    high: float
    spearman: float
    half_pearson: float
    half_spearman: float
    overlap: float
    overlap_by_chance: float
    k: int
    heads: int
    groups: int
    trials: int
    splits: int

    def __repr__(self) -> str:
        return f"Reliability({self.method!r:.40}, {self.words()})"

    def words(self) -> str:
        """``split-half reliability 0.93 over 20 trials``."""
        over = f"{self.trials} trials" + (f" in {self.groups} groups" if self.groups != self.trials else "")
        return f"split-half reliability {self.pearson:.2f} over {over}"

    def to_frame(self) -> pd.DataFrame:
        """One row."""
        return pd.DataFrame([asdict(self)])


def split_half(scores: HeadScores, *, k: int | None = None, splits: int = 200, seed: int = 0) -> Reliability:
    """How well scores from half of the trials predict those from the other half, over heads.

    The trials' groups (what was drawn independently) are divided at random into two halves, of an odd number leaving
    one out; each half scores every head by the mean of its trials, and the halves are correlated over heads. The
    correlation r is that of a half: with n = groups / groups of a half, Spearman and Brown (1910) give
    n r / (1 + (n - 1) r) for all of them, applied to the mean r over splits; a mean of 0 or below stays as it is
    [OURS]. For ranks the correction is an approximation. A head that has no trial in one of the halves is left out of
    that split.

    What it does not show: whether the method measures what it is named after, or whether other prompts, lengths or
    models would give the same; that a small difference between two good heads is real. Where a few heads stand far
    above all others, Pearson's coefficient is about them: look at the ranks too.

    Args:
        scores: of a method with at least two trials or groups.
        k: of the highest heads; by default 20, and at most a quarter of the heads.
        splits: random divisions.
        seed: of the divisions.

    Raises:
        HeadscopeError: fewer than two groups or splits, ``k`` out of range, or fewer than three heads with a score.
    """
    labels = np.arange(len(scores.trials)) if scores.groups is None else scores.groups
    labels = np.unique(labels, return_inverse=True)[1]
    groups, scored = int(labels.max()) + 1, int((scores.n > 0).sum())
    k = min(TOP, max(1, scored // 4)) if k is None else k
    if groups < 2 or splits < 2:
        what = "trials" if scores.groups is None else "independent groups of trials"
        raise HeadscopeError(
            f"{scores.method}: {groups} {what} and splits={splits}; split-half reliability needs 2 of each: add samples"
        )
    if scored < 3 or not 0 < k < scored:
        raise HeadscopeError(
            f"{scores.method}: {scored} heads have a score; it takes 3, and k={k} of 1 to fewer than all"
        )
    one, other = _halves(scores.trials.reshape(len(labels), -1), labels, groups, splits, seed)
    known = ~np.isnan(one) & ~np.isnan(other)
    pearson = np.array([_correlation(a[x], b[x]) for a, b, x in zip(one, other, known, strict=True)])
    ranked = [_correlation(rankdata(a[x]), rankdata(b[x])) for a, b, x in zip(one, other, known, strict=True)]
    shared = [_shared(a[x], b[x], k) for a, b, x in zip(one, other, known, strict=True)]
    half, half_ranks = _mean(pearson), _mean(np.array(ranked))
    factor = groups / (groups // 2)
    spread = np.array([spearman_brown(r, factor) for r in pearson if not np.isnan(r)])
    low, high = np.percentile(spread, [2.5, 97.5]) if len(spread) else (np.nan, np.nan)
    return Reliability(
        scores.method,
        spearman_brown(half, factor),
        float(low),
        float(high),
        spearman_brown(half_ranks, factor),
        half,
        half_ranks,
        _mean(np.array(shared)),
        k / scored,
        k,
        scored,
        groups,
        len(labels),
        splits,
    )


def spearman_brown(r: float, factor: float) -> float:
    """The reliability of ``factor`` times as many trials as those whose reliability is ``r``; 0 and below stay."""
    return r if not r > 0 else factor * r / (1 + (factor - 1) * r)


def _halves(
    trials: NDArray[np.float64], labels: NDArray[np.int64], groups: int, splits: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of the heads (split, head) over one half of the groups and over another, NaN without a trial."""
    sums, sizes = np.zeros((groups, trials.shape[1])), np.zeros((groups, trials.shape[1]))
    np.add.at(sums, labels, np.nan_to_num(trials))
    np.add.at(sizes, labels, ~np.isnan(trials))
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(groups), (splits, 1)), axis=1)
    size, found = groups // 2, []
    for part in (order < size, (order >= size) & (order < 2 * size)):
        weight = part.astype(np.float64)
        with np.errstate(invalid="ignore"):
            found.append((weight @ sums) / (weight @ sizes))
    return found[0], found[1]


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson's coefficient; NaN of fewer than three heads, or where one side is constant."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _shared(a: NDArray[np.float64], b: NDArray[np.float64], k: int) -> float:
    if len(a) < k:
        return float("nan")
    one, other = members(np.stack([a, b]), k)
    return float(one @ other) / k


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
