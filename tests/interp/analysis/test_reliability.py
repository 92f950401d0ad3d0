"""Split-half reliability against the reliability that the data were drawn with."""

from __future__ import annotations

import numpy as np
import pytest

from headscope.interp.analysis.reliability import Reliability, spearman_brown, split_half
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.scores import HeadScores

HEADS = 4000


def drawn(trials: int, noise: float, seed: int = 0) -> np.ndarray:
    """True scores of variance 1 with noise in each trial: (trial, layer, head)."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((1, 40, HEADS // 40)) + noise * rng.standard_normal((trials, 40, HEADS // 40))


@pytest.mark.parametrize("trials", [2, 9, 20])
@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_it_is_the_share_of_true_variance(trials: int, noise: float) -> None:
    """The mean of m trials has the reliability 1 / (1 + noise^2 / m); of a half m is trials // 2, also of odd numbers.

    Fisher: the standard error of a correlation r over H heads is (1 - r^2) / sqrt(H); the correction multiplies it by
    its slope n / (1 + (n - 1) r)^2. Splits do not add to it, they average.
    """
    found = split_half(HeadScores("m", drawn(trials, noise)), splits=50)
    half, whole = (1 / (1 + noise**2 / m) for m in (trials // 2, trials))
    n = trials / (trials // 2)
    error = (1 - half**2) / np.sqrt(HEADS)
    assert found.half_pearson == pytest.approx(half, abs=4 * error)
    assert found.pearson == pytest.approx(whole, abs=4 * error * n / (1 + (n - 1) * half) ** 2)
    ranks = 6 / np.pi * np.arcsin(half / 2)  # Spearman's coefficient of two normal variables
    assert found.half_spearman == pytest.approx(ranks, abs=5 * error)
    assert found.spearman == pytest.approx(spearman_brown(found.half_spearman, n))
    if noise == 3.0 and trials > 2:
        assert whole - half > 10 * error  # uncorrected it would be seen


def test_trials_of_a_group_stay_together() -> None:
    """Four trials of each of six groups share the group's noise: the reliability is 1 / (1 + 4/6), by trials more."""
    groups = np.repeat(np.arange(6), 4)
    rng = np.random.default_rng(1)
    noise = 2.0 * rng.standard_normal((6, 40, HEADS // 40))
    trials = rng.standard_normal((1, 40, HEADS // 40)) + noise[groups]
    found = split_half(HeadScores("m", trials, groups=groups), splits=50)
    assert found.pearson == pytest.approx(1 / (1 + 4 / 6), abs=4 * 2 / np.sqrt(HEADS))
    assert (found.groups, found.trials) == (6, 24) and "24 trials in 6 groups" in found.words()
    assert split_half(HeadScores("m", trials), splits=50).pearson > 0.85


def test_noise_alone_is_not_reliable_and_shares_heads_by_chance() -> None:
    noise = np.random.default_rng(2).standard_normal((10, 40, HEADS // 40))
    found = split_half(HeadScores("m", noise), k=400, splits=50)
    assert abs(found.half_pearson) < 4 / np.sqrt(HEADS)
    # shared ~ hypergeometric with mean 40 and deviation 5.7 of 400
    assert found.overlap_by_chance == 0.1 and found.overlap == pytest.approx(0.1, abs=4 * 5.7 / 400)
    exact = split_half(HeadScores("m", np.repeat(noise[:1], 6, axis=0)), k=400)
    assert exact.pearson == pytest.approx(1.0) and exact.spearman == pytest.approx(1.0) and exact.overlap == 1.0


def test_heads_without_trials_are_left_out() -> None:
    trials = drawn(6, 1.0)
    holes = np.concatenate([trials, np.full((6, 3, HEADS // 40), np.nan)], axis=1)
    a, b = split_half(HeadScores("m", trials), splits=20), split_half(HeadScores("m", holes), splits=20)
    assert a == b and a.heads == HEADS
    holes[:5, 0, 0] = np.nan  # one trial: never in both halves
    told = split_half(HeadScores("m", holes), splits=20)
    assert np.isfinite(told.pearson) and told.pearson == pytest.approx(a.pearson, abs=0.01)


def test_constant_scores_have_none_and_negative_ones_stay() -> None:
    constant = split_half(HeadScores("m", np.ones((4, 2, 3))))
    assert np.isnan(constant.pearson) and np.isnan(constant.low)
    assert spearman_brown(0.5, 2) == pytest.approx(2 / 3) and spearman_brown(-0.4, 2) == -0.4
    turned = np.stack([np.arange(6.0).reshape(2, 3), -np.arange(6.0).reshape(2, 3)])
    assert split_half(HeadScores("m", turned)).pearson == pytest.approx(-1.0)


def test_too_few_are_one_line() -> None:
    for scores, options, says in (
        (HeadScores("m", np.ones((1, 2, 3))), {}, "1 trials"),
        (HeadScores("m", np.ones((4, 2, 3)), groups=np.zeros(4, np.int64)), {}, "1 independent groups"),
        (HeadScores("m", np.ones((4, 1, 2))), {}, "it takes 3"),
        (HeadScores("m", np.ones((4, 2, 3))), {"k": 6}, "k=6 of 1 to fewer than all"),
        (HeadScores("m", np.ones((4, 2, 3))), {"splits": 1}, "splits=1"),
    ):
        with pytest.raises(HeadscopeError, match=says):
            split_half(scores, **options)
    found = split_half(HeadScores("m", drawn(4, 1.0)))
    assert isinstance(found, Reliability) and len(repr(found)) < 100 and found.to_frame().shape[0] == 1
