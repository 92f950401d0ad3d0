"""HeadScores: means, intervals against scipy's bootstrap, order, files, and what can be wrong with a file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.bootstrap import bootstrap_mean
from headscope.interp.results.scores import HeadScores, find_all

NAN = float("nan")


@pytest.fixture(autouse=True)
def _no_warning() -> Any:
    """Heads without trials are ordinary: no warning of numpy's may reach a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def made(trials: Any, **options: Any) -> HeadScores:
    return HeadScores("method", np.asarray(trials, dtype=np.float64), {"seed": 0}, **options)


def random_scores(trials: int = 12, layers: int = 2, heads: int = 3, **options: Any) -> HeadScores:
    return made(np.random.default_rng(0).normal(0.5, 0.2, (trials, layers, heads)), **options)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_mean_and_n_leave_out_what_a_trial_does_not_say() -> None:
    scores = made([[[1.0, NAN, NAN], [0.2, 0.0, 4.0]], [[3.0, 5.0, NAN], [0.4, 0.0, NAN]]])
    assert scores.layers == 2 and scores.heads == 3
    np.testing.assert_array_equal(scores.mean, [[2.0, 5.0, NAN], [0.2 / 2 + 0.4 / 2, 0.0, 4.0]])
    np.testing.assert_array_equal(scores.n, [[2, 1, 0], [2, 2, 1]])


def test_mean_is_numpys() -> None:
    scores = random_scores()
    np.testing.assert_allclose(scores.mean, scores.trials.mean(0), rtol=1e-14)


def test_interval_is_the_percentile_bootstrap() -> None:
    """A bound of B resamples is a quantile known to a standard error of sqrt(p (1 - p) / B) in probability.

    For a mean that is near normal with standard error s, that is sqrt(0.025 * 0.975 / B) / 0.058 * s: 0.060 s for our
    2,000 and 0.019 s for scipy's 20,000. Four of both together are 0.25 s.
    """
    scores = random_scores(30)
    low, high = scores.interval
    for layer, head in np.ndindex(2, 3):
        sample = scores.trials[:, layer, head]
        error = sample.std() / np.sqrt(len(sample))
        reference = stats.bootstrap(
            (sample,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(1)
        ).confidence_interval
        assert low[layer, head] == pytest.approx(reference.low, abs=0.25 * error)
        assert high[layer, head] == pytest.approx(reference.high, abs=0.25 * error)
        assert low[layer, head] < scores.mean[layer, head] < high[layer, head]


def test_level_decides_the_width() -> None:
    trials = random_scores(30).trials
    widths = []
    for level in (0.5, 0.8, 0.95):
        low, high = made(trials, level=level).interval
        widths.append((high - low).mean())
    # A normal mean's interval is wide by its quantile: 0.674, 1.282, 1.960 standard errors. 10 %: see the test above.
    assert widths[1] / widths[0] == pytest.approx(1.282 / 0.674, rel=0.1)
    assert widths[2] / widths[0] == pytest.approx(1.960 / 0.674, rel=0.1)


def test_groups_are_resampled_whole() -> None:
    """Ten groups of five equal trials are ten trials: the interval is that of the groups' values."""
    values = np.random.default_rng(0).normal(size=(10, 2, 3))
    grouped = made(np.repeat(values, 5, axis=0), groups=np.repeat(np.arange(10), 5))
    single, naive = made(values), made(np.repeat(values, 5, axis=0))
    np.testing.assert_allclose(grouped.interval[0], single.interval[0], rtol=1e-12)
    np.testing.assert_allclose(grouped.interval[1], single.interval[1], rtol=1e-12)
    width, narrow = (np.subtract(*reversed(scores.interval)).mean() for scores in (grouped, naive))
    assert width / narrow == pytest.approx(np.sqrt(5), rel=0.15)


def test_groups_are_labels_in_any_order() -> None:
    values = np.random.default_rng(0).normal(size=(6, 1, 2))
    one = made(values, groups=np.array([0, 0, 1, 1, 2, 2]))
    other = made(values[[4, 0, 2, 1, 5, 3]], groups=np.array([70, 5, 30, 5, 70, 30]))
    np.testing.assert_allclose(one.interval, other.interval, rtol=1e-12)


def test_groups_of_unequal_size_weigh_by_their_trials() -> None:
    """All resamples of three groups written out: the exact distribution holds our bounds at 2.5 % and 97.5 %."""
    sizes, values = [1, 2, 4], np.array([0.0, 1.0, 1.5, 4.0, 4.5, 5.0, 3.0])
    groups = np.repeat([0, 1, 2], sizes)
    means = []
    for draw in np.ndindex(3, 3, 3):
        means.append(np.concatenate([values[groups == g] for g in draw]).mean())
    low, high = bootstrap_mean(values[:, None], groups)
    assert low[0] == pytest.approx(min(means)) and high[0] == pytest.approx(max(means))  # 1/27 > 2.5 % each


def test_a_head_with_fewer_than_two_trials_has_no_interval() -> None:
    scores = made([[[1.0, NAN, NAN, 0.1]], [[3.0, 5.0, NAN, 0.2]], [[2.0, NAN, NAN, NAN]]])
    low, high = scores.interval
    np.testing.assert_array_equal(np.isnan(low), [[False, True, True, False]])
    np.testing.assert_array_equal(np.isnan(high), [[False, True, True, False]])
    for single in (made([[[1.0, 2.0]]]), made([[[1.0]], [[2.0]]], groups=np.array([3, 3]))):
        assert np.isnan(single.interval).all()


def test_nan_trials_do_not_move_a_heads_interval_beyond_the_resampling() -> None:
    """A head's interval is of the trials that speak of it (resampled with the silent ones, so a little wider)."""
    sample = np.random.default_rng(0).normal(size=40)
    silent = np.full((80, 1, 1), NAN)
    silent[::2, 0, 0] = sample
    low, high = made(silent).interval
    alone_low, alone_high = made(sample[:, None, None]).interval
    assert (high - low).item() == pytest.approx((alone_high - alone_low).item(), rel=0.25)
    assert low.item() < sample.mean() < high.item()


def test_the_interval_is_the_same_every_time() -> None:
    trials = random_scores().trials
    np.testing.assert_array_equal(made(trials).interval, made(trials.copy()).interval)


def test_intervals_cover_the_true_mean() -> None:
    """400 heads of 40 normal trials: about 94 % of intervals hold the mean, with a standard deviation of 1.2 %.

    (The percentile bootstrap is narrower than Student's interval by about sqrt(39 / 40) * 1.960 / 2.023.)
    """
    scores = made(np.random.default_rng(3).normal(0.3, 1.0, (40, 20, 20)))
    low, high = scores.interval
    assert 0.90 <= ((low <= 0.3) & (0.3 <= high)).mean() <= 0.98


def test_no_trial_is_refused() -> None:
    for shape in ((0, 2, 3), (2, 3)):
        with pytest.raises(HeadscopeError, match="method: no trial was kept"):
            made(np.zeros(shape))


# -- order -------------------------------------------------------------------------------------------------------------


def test_top_is_in_descending_order_and_ties_in_model_order() -> None:
    scores = made([[[0.2, 0.9, 0.2], [0.9, 0.1, 0.5]]])
    top = scores.top(6)
    assert list(top) == [(0, 1), (1, 0), (1, 2), (0, 0), (0, 2), (1, 1)]
    assert top.weights == (0.9, 0.9, 0.5, 0.2, 0.2, 0.1)
    assert list(scores.top(1)) == [(0, 1)] and top.name == "method top 6"


def test_above_is_strict() -> None:
    scores = made([[[0.2, 0.9, 0.2], [0.9, 0.1, 0.5]]])
    assert list(scores.above(0.5)) == [(0, 1), (1, 0)]
    assert list(scores.above(0.2)) == [(0, 1), (1, 0), (1, 2)]
    assert len(scores.above(0.9)) == 0 and len(scores.above(-1.0)) == 6


def test_heads_without_a_score_are_never_chosen() -> None:
    scores = made([[[NAN, 0.9, 0.2], [NAN, NAN, NAN]]])
    assert list(scores.top(2)) == list(scores.above(-5.0)) == [(0, 1), (0, 2)]
    with pytest.raises(HeadscopeError, match=r"top\(3\) asks for heads that have no score; choose 1 to 2"):
        scores.top(3)


@pytest.mark.parametrize("k", [0, -1, 7])
def test_top_of_too_many_or_none_is_refused(k: int) -> None:
    with pytest.raises(HeadscopeError, match="choose 1 to 6"):
        random_scores().top(k)


def test_frame_is_tidy() -> None:
    scores = made([[[0.2, 0.9], [NAN, 0.1]], [[0.4, 0.7], [NAN, 0.3]]])
    frame = scores.to_frame()
    assert list(frame.columns) == ["layer", "head", "score", "ci_low", "ci_high", "n"]
    assert list(zip(frame["layer"], frame["head"], strict=True)) == [(0, 1), (0, 0), (1, 1), (1, 0)]
    assert list(frame["n"]) == [2, 2, 2, 0]
    low, high = scores.interval
    assert frame["ci_low"][0] == low[0, 1] and frame["ci_high"][1] == high[0, 0]


# -- files -------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    trials = random_scores(6).trials
    trials[0, 1, 2] = NAN
    trials[:, 0, 0] = NAN
    details = tuple({"length": i, "answer": "<b>é</b>"} for i in range(6))
    groups = np.array([0, 0, 1, 1, 2, 2])
    scores = made(trials, groups=groups, details=details, level=0.8, resamples=500)
    path = scores.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in path.parent.iterdir()) == ["method.json", "method.parquet"]
    for loaded in (HeadScores.load(path), HeadScores.load(path.parent)):
        np.testing.assert_array_equal(loaded.trials, scores.trials)
        np.testing.assert_array_equal(loaded.interval, scores.interval)
        assert loaded.method == "method" and loaded.details == details and loaded.provenance == {"seed": 0}
        assert (loaded.level, loaded.resamples) == (0.8, 500)
        assert list(loaded.top(3)) == list(scores.top(3))


def test_trials_without_groups_stay_so_in_effect(tmp_path: Path) -> None:
    scores = random_scores()
    np.testing.assert_array_equal(HeadScores.load(scores.save(tmp_path)).interval, scores.interval)


def test_the_json_is_valid_json_and_says_what_design_promises(tmp_path: Path) -> None:
    scores = made([[[0.2, NAN]], [[0.4, NAN]]], details=({"loss": NAN}, {"loss": np.float32(2), "bad": float("inf")}))
    path = scores.save(tmp_path)
    document = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["heads"][0]["score"] == pytest.approx(0.3)
    assert set(document["heads"][0]) == {"layer", "head", "score", "ci_low", "ci_high", "n"}
    assert document["heads"][1] == {"layer": 0, "head": 1, "score": None, "ci_low": None, "ci_high": None, "n": 0}
    assert document["provenance"] == {"seed": 0}
    assert document["trials"] == [{"loss": None}, {"loss": 2.0, "bad": None}]


def test_the_parquet_is_one_row_a_trial_and_head(tmp_path: Path) -> None:
    scores = random_scores(4)
    frame = pd.read_parquet(scores.save(tmp_path).with_suffix(".parquet"))
    assert len(frame) == 4 * 2 * 3
    row = frame[(frame["trial"] == 3) & (frame["layer"] == 1) & (frame["head"] == 2)]
    assert row["score"].item() == scores.trials[3, 1, 2]


def test_a_missing_file_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(HeadscopeError, match="does not exist; run `headscope discover"):
        HeadScores.load(tmp_path / "nothing.json")


def test_a_folder_must_hold_one(tmp_path: Path) -> None:
    with pytest.raises(HeadscopeError, match="holds no head scores"):
        HeadScores.load(tmp_path)
    scores = random_scores()
    scores.save(tmp_path)
    HeadScores("other", scores.trials).save(tmp_path)
    with pytest.raises(HeadscopeError, match=r"holds 2 head-score files \(method.json, other.json\); name one"):
        HeadScores.load(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "3", '{"format": 2}', '{"format": 2, "method": "m", "layers": 2}', "\x00"]
)
def test_foreign_json_is_refused(tmp_path: Path, content: str) -> None:
    path = random_scores().save(tmp_path)
    path.write_text(content)
    with pytest.raises(HeadscopeError, match="is not a head-score file of headscope"):
        HeadScores.load(path)


def test_other_damage_is_refused(tmp_path: Path) -> None:
    path = random_scores().save(tmp_path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "format": 99}))
    with pytest.raises(HeadscopeError, match="head scores of format 99, this version reads 2"):
        HeadScores.load(path)
    path.write_text(json.dumps({**document, "layers": 7}))  # 72 scores are not trials of 7 x 3 heads
    with pytest.raises(HeadscopeError, match="is not a head-score file"):
        HeadScores.load(path)
    path.write_text(json.dumps(document))
    table = path.with_suffix(".parquet")
    whole = table.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"PAR1" + bytes(50)):
        table.write_bytes(damaged)
        with pytest.raises(HeadscopeError, match="is not a head-score file"):
            HeadScores.load(path)
    pd.DataFrame({"x": [1]}).to_parquet(table)
    with pytest.raises(HeadscopeError, match="is not a head-score file"):
        HeadScores.load(path)
    table.unlink()
    with pytest.raises(HeadscopeError, match="is not a head-score file"):
        HeadScores.load(path)


def test_a_folder_says_which_scores_have_lost_their_table(tmp_path: Path) -> None:
    random_scores().save(tmp_path / "kept")
    random_scores().save(tmp_path / "lost")
    (tmp_path / "lost" / "method.parquet").unlink()
    assert list(find_all(tmp_path / "kept")) == ["method.parquet"]
    with pytest.raises(HeadscopeError, match=r"lost.method\.json"):
        find_all(tmp_path)
