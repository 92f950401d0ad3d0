"""Differences between two runs of a method: paired where trials are the same, intervals that cover, models by depth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from headscope.interp.analysis.comparison import compare
from headscope.interp.analysis.depth import by_depth, distribution_distance
from headscope.interp.analysis.difference import contrast, same_trials
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.scores import HeadScores, find_all
from headscope.interp.runs.sealed import unsealed

MADE = {"parameters": {"samples": 30}, "seed": 0, "model": {"name": "one", "revision": "a"}}


def run(trials: np.ndarray, method: str = "m", kept: list[int] | None = None, **made: object) -> HeadScores:
    kept = list(range(len(trials))) if kept is None else kept
    details = tuple({"sample": i, "kept": i in kept} for i in range(max(kept) + 1))
    return HeadScores(method, trials, MADE | made, None, details)


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Two runs whose trials share much of their noise and whose scores are the same."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((30, 40, 50))
    return tuple(shared + 0.1 * rng.standard_normal((30, 40, 50)) for _ in range(2))


def test_the_same_trials_are_paired_and_others_are_not(drawn) -> None:
    first, second = run(drawn[0]), run(drawn[1])
    paired, apart = contrast(first, second), contrast(first, run(drawn[1], seed=1))
    assert paired.paired and not apart.paired and paired.trials == apart.trials == (30, 30)
    width = [np.mean(one.high - one.low) for one in (paired, apart)]
    assert width[0] < 0.15 * width[1]  # 0.1 sqrt(2) of noise against sqrt(2 * 1.01)
    np.testing.assert_allclose(paired.change, apart.change, atol=1e-12)
    assert "paired over 30 trials" in repr(paired) and "unpaired, 30 and 30" in repr(apart)
    assert not contrast(HeadScores("m", drawn[0]), HeadScores("m", drawn[1])).paired  # nothing is known of their trials


def test_other_settings_and_few_trials_are_said(drawn) -> None:
    first, other = run(drawn[0]), run(drawn[1], parameters={"samples": 30, "length": 20})
    assert "but their settings differ: length (None and 20)" in contrast(first, other).words()
    assert "settings" not in contrast(first, run(drawn[1])).words()
    few = contrast(run(drawn[0][:4]), run(drawn[1][:4])).words()
    assert "more than 100 would by chance: intervals of so few are too narrow" in few
    assert "about 100 would by chance" in contrast(first, run(drawn[1])).words()


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_cover_as_often_as_they_can(drawn, paired: bool) -> None:
    """A percentile interval of n normal trials is 1.96 times a deviation that divides by n: it misses 0 with the
    probability of |t| > 1.96 sqrt((n - 1) / n), here of 29 or 58 degrees of freedom, and with 4 standard errors."""
    second = run(
        drawn[1] if paired else np.random.default_rng(7).standard_normal((30, 40, 50)), seed=0 if paired else 1
    )
    found = contrast(run(drawn[0]), second)
    misses = 2 * stats.t(29 if paired else 58).sf(1.96 * np.sqrt(29 / 30))
    share = found.apart.mean()
    assert share == pytest.approx(misses, abs=4 * np.sqrt(misses * (1 - misses) / 2000) + 0.005)  # and 2000 resamples
    assert found.tested == 2000 and "(about 100 would by chance)" in found.words()


def test_a_change_is_found_where_it_is(drawn) -> None:
    moved = drawn[0].copy()
    moved[:, 3, 4] += 0.5
    moved[:, 1, 2] -= 0.25
    found = contrast(run(drawn[0]), run(moved), names=("a", "b"))
    assert found.heads().heads == ((3, 4), (1, 2)) and found.heads().weights == pytest.approx((0.5, -0.25))
    frame = found.to_frame()
    assert frame.loc[0, ["layer", "head"]].tolist() == [3, 4] and frame.loc[0, "change"] == pytest.approx(0.5)
    assert frame["apart"].sum() == 2 and found.low[0, 0] == found.high[0, 0] == 0.0
    assert found.agreement.matrix("spearman").loc["a", "b"] > 0.99


def test_trials_that_one_run_dropped_are_paired_by_their_number(drawn) -> None:
    few = drawn[0][[0, 2, 5]]
    first, second = run(few, kept=[0, 2, 5]), run(drawn[1][[2, 4, 5]], kept=[2, 4, 5])
    assert same_trials(first, second) == ([1, 2], [0, 2])
    found = contrast(first, second)
    np.testing.assert_allclose(found.change, (drawn[1][[2, 5]] - drawn[0][[2, 5]]).mean(0), atol=1e-12)
    assert found.trials == (2, 2)


def test_groups_are_resampled_together(drawn) -> None:
    groups = np.repeat(np.arange(10), 3)
    one, other = (HeadScores("m", x, MADE, groups, run(x).details) for x in drawn)
    differs = HeadScores("m", drawn[1], MADE, np.tile(np.arange(10), 3), run(drawn[1]).details)
    assert contrast(one, other).paired and not contrast(one, differs).paired


def test_depth_pools_heads_by_hand() -> None:
    one = HeadScores("m", np.arange(8.0).reshape(1, 4, 2))
    two = HeadScores("m", np.array([[[0.0, 10.0, np.nan], [1.0, 2.0, 30.0]]]))
    frame = by_depth([one, two], ["x", "y"], bins=2)
    assert frame["mean"].tolist() == [1.5, 5.5, 5.0, 11.0] and frame["heads"].tolist() == [4, 4, 2, 3]
    assert frame["highest_head"].tolist() == ["L1H1", "L3H1", "L0H1", "L1H2"]
    assert by_depth([one], ["x"], bins=8)["heads"].tolist() == [0, 2] * 4 and distribution_distance(one, one) == 0
    assert distribution_distance(one, HeadScores("m", one.trials + 100)) == 1
    with pytest.raises(HeadscopeError, match="one method"):
        by_depth([one, HeadScores("n", one.trials)], ["x", "y"])


def test_what_runs_allow_is_compared(drawn, tmp_path: Path) -> None:
    other = {"model": {"name": "two", "revision": "b"}}
    methods = compare({"r": [run(drawn[0], "a"), run(drawn[1], "b")], "s": [run(drawn[0] ** 2, "c")]})
    assert methods.agreement is not None and methods.agreement.names == ("a", "b", "c") and not methods.differences
    models = compare({"r": [run(drawn[0], "a"), run(drawn[1], "b")], "s": [run(drawn[1], "a", **other)]})
    assert models.agreement is None and [one.names for one in models.differences] == [("r", "s")]
    assert models.notes == ("b is in one run alone and was left out",)
    shapes = compare({"r": [run(drawn[0])], "s": [run(drawn[1][:, :20], **other)]})
    assert not shapes.differences and len(shapes.depth) == 8 and "match_heads" in shapes.notes[-1]
    for found, tables in ((methods, ("pairs", "heads")), (models, ("pairs", "heads")), (shapes, ("depth",))):
        folder = found.save(tmp_path / "out" / tables[0] / str(len(found.notes))).parent
        document = unsealed(json.loads((folder / "compare.json").read_text()))
        assert document["kind"] == "headscope comparison" and len(document["runs"]) == len(found.scores)
        written = {f"compare_{name}.{end}" for name in tables for end in ("csv", "parquet")}
        assert {path.name for path in folder.iterdir()} == {"compare.json", *written} and len(repr(found)) < 200
        for name in tables:
            assert len(pd.read_csv(folder / f"compare_{name}.csv")) == len(
                pd.read_parquet(folder / f"compare_{name}.parquet")
            )
    assert find_all(tmp_path) == {}  # its tables are no head scores


def test_what_cannot_be_compared_is_one_line(drawn) -> None:
    a, b = run(drawn[0], "a"), run(drawn[1], "b", model={"name": "two", "revision": "b"})
    for given, says in (({"r": [a]}, "fewer than two"), ({"r": [a], "s": [b]}, "r has a of one, s has b of two")):
        with pytest.raises(HeadscopeError, match=says):
            compare(given)
    with pytest.raises(HeadscopeError, match="two methods"):
        contrast(a, b)
    with pytest.raises(HeadscopeError, match="relative depth"):
        contrast(a, run(drawn[0][:, :3], "a"))
