"""The statistics of paired trials against the same written out, and against scipy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from headscope.interp.results.bootstrap import bootstrap_mean, percentile_interval, resampled_means
from headscope.interp.results.paired import (
    EXACT,
    FLIPS,
    RESAMPLES,
    crossed_interval,
    expanded,
    mean_interval,
    permutation_p,
)

DIFFERENCES = np.array([0.3, -0.1, 0.5, 0.2, 0.0, 0.7, -0.2, 0.4])
GROUPS = np.array([7, 7, 2, 2, 2, 5, 9, 9])


def by_hand(sums: NDArray[np.float64]) -> float:
    """The share of all signs whose sum is as far from 0."""
    found = [abs(sum(s * x for s, x in zip(signs, sums, strict=True))) for signs in product([1, -1], repeat=len(sums))]
    return float(np.mean([one >= abs(sums.sum()) - 1e-12 for one in found]))


def test_the_exact_test_tries_all_signs() -> None:
    columns = np.stack([DIFFERENCES, -DIFFERENCES, np.abs(DIFFERENCES), 0 * DIFFERENCES], axis=1)
    expected = [by_hand(columns[:, i]) for i in range(4)]
    np.testing.assert_allclose(permutation_p(columns), expected, rtol=1e-12)
    assert expected[3] == 1.0 and expected[2] == 2 / 2**7, "a trial that does not differ counts for nothing"
    reference = stats.permutation_test((DIFFERENCES,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert expected[0] == pytest.approx(reference.pvalue)


def test_groups_turn_together() -> None:
    sums = np.array([DIFFERENCES[GROUPS == group].sum() for group in (7, 2, 5, 9)])
    np.testing.assert_allclose(permutation_p(DIFFERENCES[:, None], GROUPS), [by_hand(sums)], rtol=1e-12)
    assert by_hand(sums) == 2 / 2**4


def test_many_trials_are_turned_at_random_and_the_observed_one_counts() -> None:
    """Within 4 standard errors of the exact p of 18 trials; what no turn reaches has p = 1 / (1 + turns)."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.25, 1, size=(EXACT + 4, 1))
    signs = 1 - 2.0 * (np.arange(2**18)[:, None] >> np.arange(18) & 1)
    exact = float((np.abs(signs @ values) >= np.abs(values.sum()) - 1e-12).mean())
    found = permutation_p(values)[0]
    assert 0.02 < exact < 0.98 and abs(found - exact) < 4 * np.sqrt(exact * (1 - exact) / FLIPS) + 1 / FLIPS
    assert permutation_p(values)[0] == found != permutation_p(values, seed=1)[0]
    assert permutation_p(np.ones((60, 1)), flips=99)[0] == 1 / 100
    several = permutation_p(np.concatenate([values, rng.normal(size=(18, 3)), np.zeros((18, 1))], axis=1))
    assert several[0] == found and several[4] == 1.0, "a column's p depends on the others"


def test_a_difference_that_is_no_number_has_no_p() -> None:
    p = permutation_p(np.array([[np.nan, 1.0], [1.0, 1.0]]))
    assert np.isnan(p[0]) and p[1] == 0.5


def test_expanded_is_students_width() -> None:
    """Of normal resampled means, whose standard deviation is sqrt((n - 1) / n) s / sqrt(n), the bounds are t's."""
    for n in (3, 6, 20, 1000):
        z = stats.norm.ppf((1 + expanded(0.95, n)) / 2) * np.sqrt((n - 1) / n)
        assert z == pytest.approx(stats.t.ppf(0.975, n - 1), rel=1e-6)
    assert expanded(0.95, 100_000) == pytest.approx(0.95, abs=1e-5)


def test_the_interval_is_a_wider_percentile_interval_and_never_leaves_the_scores() -> None:
    values = DIFFERENCES[:, None]
    means = resampled_means(values, resamples=RESAMPLES)
    expected = percentile_interval(means, expanded(0.95, 8))
    np.testing.assert_array_equal(mean_interval(values), expected)
    low, high = bootstrap_mean(values, resamples=RESAMPLES)
    assert expected[0] < low and high < expected[1]
    for few in (values[:2], values[:3]):
        low, high = mean_interval(few)
        assert low >= few.min() - 1e-12 and high <= few.max() + 1e-12
    assert np.isnan(mean_interval(values[:1])).all() and np.isnan(mean_interval(values, np.zeros(8, int))).all()
    by_group = np.array([[DIFFERENCES[GROUPS == group].mean()] for group in (7, 5, 9)])
    low, high = mean_interval(DIFFERENCES[GROUPS != 2][:, None], GROUPS[GROUPS != 2])
    assert by_group.min() - 1e-12 <= low[0] < high[0] <= by_group.max() + 1e-12


def test_draws_in_parts_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(30, 4))
    whole = resampled_means(values, resamples=500)
    monkeypatch.setattr("headscope.interp.results.bootstrap.HELD", 30 * 7)
    np.testing.assert_allclose(resampled_means(values, resamples=500), whole, rtol=0, atol=1e-14)  # order of sums


def test_crossed_resampling_written_out() -> None:
    """With the same weights drawn; groups of trials are drawn whole."""
    rng = np.random.default_rng(3)
    values, groups = rng.normal(size=(7, 5)), np.array([0, 0, 1, 2, 2, 2, 3])
    for labels in (None, groups):
        each = np.arange(7) if labels is None else labels
        count, draw = len(set(each)), np.random.default_rng(0)
        rows = draw.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        columns = draw.multinomial(5, np.full(5, 0.2), size=RESAMPLES)
        means = []
        for r, c in zip(rows, columns, strict=True):
            weight = r[each][:, None] * c[None]
            means.append((weight * values).sum() / weight.sum())
        expected = percentile_interval(np.array(means)[:, None], expanded(0.95, min(count, 5)))
        assert crossed_interval(values, labels) == pytest.approx((expected[0][0], expected[1][0]))
    assert np.isnan(crossed_interval(values[:1])).all()
    single = crossed_interval(values[:, :1])
    assert single[0] < values[:, 0].mean() < single[1]
