"""Simulated evaluations without an effect: p-values are uniform, and intervals cover where their docstring says so.

1,000 evaluations of every size and kind of score. A bound is a quantile of the binomial beyond which a right statistic
is once in 10,000 times; of the 120 or so bounds here one seed in 80 would fail one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from headscope.interp.results import paired
from headscope.interp.results.bootstrap import bootstrap_mean, percentile_interval, resampled_means
from headscope.interp.results.multiple import holm
from headscope.interp.results.paired import EXACT, FEW, crossed_interval, mean_interval, permutation_p

RUNS, RARE = 1000, 1e-4
SIZES = (6, 10, 20, 100)
Rng = np.random.Generator
Scores = NDArray[np.float64]
TIED = np.array([0.0, 0.25, 0.5, 1.0]), np.array([0.1, 0.1, 0.2, 0.6])  # values of a recall, and how often
KINDS: dict[str, tuple[Callable[[Rng, int], Scores], float]] = {
    "normal": (lambda rng, n: rng.normal(size=(n, RUNS)), 0.0),
    "right or wrong, 0.5": (lambda rng, n: 1.0 * (rng.random((n, RUNS)) < 0.5), 0.5),
    "right or wrong, 0.8": (lambda rng, n: 1.0 * (rng.random((n, RUNS)) < 0.8), 0.8),
    "tied": (lambda rng, n: rng.choice(TIED[0], p=TIED[1], size=(n, RUNS)), float(TIED[0] @ TIED[1])),
}
LOW = int(stats.binom.ppf(RARE, RUNS, 0.95))
HIGH = int(stats.binom.ppf(1 - RARE, RUNS, 0.95))


def differences(kind: str, n: int, seed: int = 0) -> Scores:
    """(trial, evaluation): two conditions that draw their scores alike, paired by a trial's own difficulty."""
    draw, rng = KINDS[kind][0], np.random.default_rng([seed, n, len(kind)])
    one, other = draw(rng, n), draw(rng, n)
    return one - other


def covered(interval: tuple[Scores, Scores], truth: float) -> int:
    return int(((interval[0] <= truth + 1e-12) & (truth - 1e-12 <= interval[1])).sum())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_p_values_without_an_effect(kind: str, n: int) -> None:
    """P(p <= a) <= a whatever the scores; without ties it is the largest p that there is up to a, exactly."""
    p = permutation_p(differences(kind, n))
    assert p.shape == (RUNS,) and (p > 0).all() and (p <= 1).all()
    for a in (0.01, 0.05, 0.1, 0.5):
        assert (p <= a).sum() <= stats.binom.ppf(1 - RARE, RUNS, a), a
        if kind == "normal":
            steps = 2 ** (n - 1) if n <= EXACT else paired.FLIPS + 1
            assert (p <= a).sum() >= stats.binom.ppf(RARE, RUNS, np.floor(a * steps + 1e-9) / steps), a
    if kind == "normal" and n > EXACT:  # steps of 1e-4, against which a sample of 1,000 is coarse
        assert stats.kstest(p, "uniform").pvalue > RARE


@pytest.mark.slow
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_of_differences_cover(kind: str, n: int) -> None:
    """At 95 % from n = 10 on, at 93 % at n = 6 without ties, as ``mean_interval`` says; ties cover more."""
    values = differences(kind, n)
    least = LOW if n > FEW else int(stats.binom.ppf(RARE, RUNS, 0.93))
    found = covered(mean_interval(values), 0.0)
    assert found >= least
    if kind == "normal":
        assert found <= HIGH
    if kind == "normal" and n <= 10:
        plain = covered(bootstrap_mean(values, resamples=paired.RESAMPLES), 0.0)
        assert plain < least, "the case does not tell the interval from the plain percentile one"


@pytest.mark.slow
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["right or wrong, 0.5", "right or wrong, 0.8", "tied"])
def test_intervals_of_means_cover_but_for_few_trials_near_the_end_of_the_scale(kind: str, n: int) -> None:
    draw, truth = KINDS[kind]
    found = covered(mean_interval(draw(np.random.default_rng([2, n]), n)), truth)
    named = kind == "right or wrong, 0.8" and n in (6, 10)  # said by ``mean_interval``: 0.74 and 0.89
    assert (found < LOW) == named


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 100])
def test_intervals_cover_an_effect_and_p_values_show_it(n: int) -> None:
    """Right in 0.9 of the trials, and in 0.6 of them under an edit."""
    rng = np.random.default_rng(n)
    values = (rng.random((n, RUNS)) < 0.6) * 1.0 - (rng.random((n, RUNS)) < 0.9)
    assert covered(mean_interval(values), -0.3) >= LOW
    assert (permutation_p(values) <= 0.05).mean() > (0.4 if n == 20 else 0.95)


def test_fewer_than_six_trials_show_nothing() -> None:
    """No p is below 0.05, and the interval, within the range of the data, cannot cover 95 %: 1 - 2 / 2 ** n."""
    for n in (3, 4, 5):
        values = np.random.default_rng(n).normal(size=(n, RUNS))
        assert permutation_p(values).min() == 2 / 2**n > 0.05
        assert covered(mean_interval(values), 0.0) <= stats.binom.ppf(1 - RARE, RUNS, 1 - 2 / 2**n)


@pytest.mark.parametrize("size", [1, 4])
def test_groups_count_as_one(size: int) -> None:
    """Twelve questions in ``size`` orders each, and half of them in one more: a question's orders share its luck."""
    rng = np.random.default_rng(size)
    groups = np.concatenate([np.repeat(np.arange(12), size), np.arange(6)])
    luck = rng.normal(size=(12, RUNS))
    values = luck[groups] + 0.5 * rng.normal(size=(len(groups), RUNS))
    grouped, alone = permutation_p(values, groups), permutation_p(values)
    level = np.floor(0.05 * 2**11) / 2**11
    bounds = stats.binom.ppf([RARE, 1 - RARE], RUNS, level)
    assert bounds[0] <= (grouped <= 0.05).sum() <= bounds[1] < (alone <= 0.05).sum()
    assert covered(mean_interval(values, groups), 0.0) >= stats.binom.ppf(RARE, RUNS, 0.93)  # of unequal sizes
    assert covered(mean_interval(values), 0.0) < stats.binom.ppf(RARE, RUNS, 0.93)


def test_holm_keeps_the_error_of_a_family() -> None:
    """Five tasks without an effect: that any adjusted p is at most 0.05 happens in at most 5 % of the evaluations."""
    p = np.stack([permutation_p(differences("normal", 10, seed)) for seed in range(5)])  # (task, evaluation)
    smallest = np.array([holm(one).min() for one in p.T])
    assert (smallest <= 0.05).sum() <= stats.binom.ppf(1 - RARE, RUNS, 0.05) < (p.min(axis=0) <= 0.05).sum()


def test_contrast_intervals_cover_where_controls_and_trials_vary() -> None:
    """Differences are mu + trial effect + control effect + noise. Resampling two crossed factors is conservative where
    noise dominates and close to nominal where the factors do; resampling trials only must not cover."""
    rng = np.random.default_rng(1)
    both = trials_only = plain = 0
    for _ in range(150):
        values = -0.2 + rng.normal(0, 1, (6, 1)) + rng.normal(0, 1, (1, 10)) + rng.normal(0, 0.5, (6, 10))
        low, high = crossed_interval(values)
        both += low <= -0.2 <= high
        for_trials = mean_interval(values.mean(1, keepdims=True))
        trials_only += covered(for_trials, -0.2)
        means = resampled_means(values.mean(1, keepdims=True))
        plain += covered(percentile_interval(means, 0.95), -0.2)
    assert both >= stats.binom.ppf(RARE, 150, 0.95)
    assert plain < trials_only < both
