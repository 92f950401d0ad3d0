"""One method on two models of one shape (two checkpoints, two models, two settings): what differs, head by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headscope.interp.analysis.agreement import Agreement, agree
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.bootstrap import bootstrap_mean, percentile_interval, resampled_means
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores

ENOUGH = 20  # trials from which on a percentile interval of a mean covers about what it says


@dataclass(frozen=True, eq=False, repr=False)
class Difference:
    """What ``contrast`` found of a ``method`` on the runs ``names`` (first, second).

    ``before``, ``after``, ``change``, ``low`` and ``high`` are (layer, head): the two scores, second minus first, and
    its interval of ``level``. ``paired``: over ``trials`` trials that both runs have, else both runs' own (first,
    second). ``unlike``: the method's settings that the runs do not share. ``agreement``: rank correlation and shared
    top heads of the two, beside their nulls.
    """

    method: str
    names: tuple[str, str]
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    change: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    paired: bool
    trials: tuple[int, int]
    level: float
    agreement: Agreement
    unlike: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Difference({self.method!r:.40}, {self.words()})"

    @property
    def apart(self) -> NDArray[np.bool_]:
        """Where the interval excludes 0 (layer, head)."""
        return np.asarray((self.low > 0) | (self.high < 0))

    @property
    def tested(self) -> int:
        """Heads that have an interval."""
        return int((~np.isnan(self.low)).sum())

    def words(self) -> str:
        """``12 of 270 heads differ (about 13.5 would by chance), paired over 20 trials``."""
        over = (
            f"paired over {self.trials[0]} trials"
            if self.paired
            else f"unpaired, {self.trials[0]} and {self.trials[1]} trials"
        )
        over += f"; but their settings differ: {', '.join(self.unlike)}" if self.unlike else ""
        chance = f"about {(1 - self.level) * self.tested:.3g} would by chance"
        if min(self.trials) < ENOUGH:
            chance = (
                f"more than {(1 - self.level) * self.tested:.3g} would by chance: intervals of so few are too narrow"
            )
        return f"{int(self.apart.sum())} of {self.tested} heads differ ({chance}), {over}"

    def heads(self) -> HeadSet:
        """The heads whose interval excludes 0, the largest change first, weighted by it (second minus first)."""
        order = np.argsort(-np.abs(np.where(self.apart, self.change, 0.0)), axis=None, kind="stable")
        chosen = order[: int(self.apart.sum())]
        pairs = tuple((int(i) // self.change.shape[1], int(i) % self.change.shape[1]) for i in chosen)
        return HeadSet(pairs, tuple(float(self.change[pair]) for pair in pairs), f"{self.method} changed")

    def document(self) -> dict[str, Any]:
        """What was compared and which heads changed, as JSON; ``to_frame`` has every head."""
        changed = self.heads()
        heads = [{"layer": x, "head": y, "change": w} for (x, y), w in zip(changed, changed.weights, strict=True)]
        return {
            "method": self.method,
            "from": self.names[0],
            "to": self.names[1],
            "paired": self.paired,
            "trials": list(self.trials),
            "level": self.level,
            "tested": self.tested,
            "expected_by_chance": (1 - self.level) * self.tested,
            "heads": heads,
        }

    def to_frame(self) -> pd.DataFrame:
        """One row a head, the largest change first: layer, head, first, second, change, ci_low, ci_high, apart."""
        layer, head = (np.asarray(index) for index in np.indices(self.change.shape))
        columns: dict[str, NDArray[Any]] = {
            "layer": layer,
            "head": head,
            "first": self.before,
            "second": self.after,
            "change": self.change,
        }
        columns |= {"ci_low": self.low, "ci_high": self.high, "apart": self.apart}
        frame = pd.DataFrame({name: values.ravel() for name, values in columns.items()})
        order = np.argsort(-frame["change"].abs(), kind="stable")
        return frame.iloc[order].reset_index(drop=True)


def contrast(
    first: HeadScores,
    second: HeadScores,
    *,
    names: tuple[str, str] = ("first", "second"),
    k: int | None = None,
    permutations: int | None = None,
    seed: int = 0,
) -> Difference:
    """How far every head's score changes from one run of a method to another, with a bootstrap interval [OURS].

    Where both runs have the same trials (settings, seed and trials are described alike), differences are taken within
    those that both kept and their groups resampled together; else both runs are resampled by themselves. ``level`` and
    ``resamples`` are the first run's.

    What it does not show: that L3H2 of one model is L3H2 of another, if these were not trained from the same weights
    (``headscope.interp.heads.position.matching`` says which head is which). Intervals are each head's own: of many
    heads some exclude 0 by chance (5 % of them where nothing changed), and percentile intervals over few trials are too
    narrow, so that it is more.

    Args:
        first, second: HeadScores of one method, of models of one shape.
        names: what to call the two runs.
        k, permutations, seed: of ``agree`` between the two.

    Raises:
        HeadscopeError: two methods, or models of different shapes.
    """
    if first.method != second.method:
        raise HeadscopeError(
            f"{first.method} and {second.method} are two methods, whose scores have no difference: take agreement"
        )
    if first.mean.shape != second.mean.shape:
        raise HeadscopeError(
            f"{first.method}: {first.layers} x {first.heads} and {second.layers} x {second.heads} heads do not "
            "correspond; compare them by relative depth (by_depth)"
        )
    found = agree([first, second], names=names, k=k, permutations=permutations, seed=seed)
    level, resamples = first.level, first.resamples
    both = same_trials(first, second)
    if both is not None:
        one, other = (run.trials[rows] for run, rows in zip((first, second), both, strict=True))
        groups = None if first.groups is None else first.groups[both[0]]
        low, high = bootstrap_mean(other - one, groups, level=level, resamples=resamples, seed=seed)
        change = _mean(other - one)
        counts = (len(one), len(one))
    else:
        draws = [
            resampled_means(run.trials, run.groups, resamples=resamples, seed=seed + place)
            for place, run in enumerate((first, second))
        ]
        low, high = percentile_interval(draws[1] - draws[0], level)
        change, counts = second.mean - first.mean, (len(first.trials), len(second.trials))
    runs = first.mean, second.mean
    told = _unlike(first, second)
    return Difference(first.method, names, *runs, change, low, high, both is not None, counts, level, found, told)


def _unlike(first: HeadScores, second: HeadScores) -> tuple[str, ...]:
    one, other = (dict(run.provenance.get("parameters") or {}) for run in (first, second))
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return tuple(f"{key} ({one.get(key)!r:.30} and {other.get(key)!r:.30})" for key in keys)


def same_trials(first: HeadScores, second: HeadScores) -> tuple[list[int], list[int]] | None:
    """The rows of each run's trials that are the same trials, or None where the runs did not have the same.

    A method makes its trials from its settings, its seed and the model; where these are described alike, the i-th
    trial of one run is that of the other, whether they kept it or not.
    """
    told = [(run.provenance.get("parameters"), run.provenance.get("seed"), len(run.details)) for run in (first, second)]
    kept = [[i for i, one in enumerate(run.details) if one.get("kept", True)] for run in (first, second)]
    described = all(len(k) == len(run.trials) for k, run in zip(kept, (first, second), strict=True))
    if told[0] != told[1] or not described:
        return None
    shared = sorted(set(kept[0]) & set(kept[1]))
    rows = tuple([k.index(trial) for trial in shared] for k in kept)
    parts = [np.arange(len(run.trials)) if run.groups is None else run.groups for run in (first, second)]
    alike = [np.unique(part[row], return_inverse=True)[1] for part, row in zip(parts, rows, strict=True)]
    return (rows[0], rows[1]) if shared and np.array_equal(alike[0], alike[1]) else None


def _mean(trials: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(trials, axis=0) / (~np.isnan(trials)).sum(axis=0))
