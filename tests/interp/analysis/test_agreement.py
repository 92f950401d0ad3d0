"""Agreement between methods: nulls against closed forms, depth that is no agreement, layers without scores."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from headscope.interp.analysis.agreement import Agreement, agree, found_alike
from headscope.interp.analysis.shuffles import orders, two_sided
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.multiple import holm
from headscope.interp.results.scores import HeadScores

LAYERS, HEADS, K, DRAWS = 6, 8, 10, 4000


def scores(name: str, values: np.ndarray, **made: object) -> HeadScores:
    return HeadScores(name, values[None], dict(made))


@pytest.fixture
def drawn() -> np.ndarray:
    return np.random.default_rng(1).random((3, LAYERS, HEADS))


def row(found: Agreement, measure: str, null: str, at: int = 0) -> dict:
    frame = found.to_frame()
    return frame[(frame["measure"] == measure) & (frame["null"] == null)].iloc[at].to_dict()


def in_layers(values: np.ndarray) -> np.ndarray:
    """How many of the top K are in each layer."""
    best = np.argsort(-values.ravel(), kind="stable")[:K]
    return np.bincount(best // HEADS, minlength=LAYERS)


def test_the_jaccard_nulls_are_hypergeometric(drawn) -> None:
    """Of all heads, shared ~ Hypergeom(N, K, K); within layers, the sum of the layers' own."""
    drawn += 0.1 * np.arange(LAYERS)[:, None]  # the top heads gather in late layers
    found = agree([scores("a", drawn[0]), scores("b", drawn[1])], k=K, permutations=DRAWS)
    everywhere = stats.hypergeom(LAYERS * HEADS, K, K).pmf(np.arange(K + 1))
    inside = np.ones(1)
    for a, b in zip(in_layers(drawn[0]), in_layers(drawn[1]), strict=True):
        inside = np.convolve(inside, stats.hypergeom(HEADS, a, b).pmf(np.arange(min(a, b) + 1)))
    means = {}
    for null, pmf in (("all heads", everywhere), ("within layers", inside)):
        jaccard = np.arange(len(pmf)) / (2 * K - np.arange(len(pmf)))
        mean = means[null] = pmf @ jaccard
        deviation = np.sqrt(pmf @ jaccard**2 - mean**2)
        assert abs(row(found, "jaccard", null)["null_mean"] - mean) < 4 * deviation / np.sqrt(DRAWS)
    assert means["within layers"] > 1.2 * means["all heads"]  # one would be seen in place of the other
    shared = set(map(tuple, found.shared("a", "b").heads))
    assert shared == set(found.top("a").heads) & set(found.top("b").heads)
    expected = len(shared) / (2 * K - len(shared))
    assert row(found, "jaccard", "all heads")["observed"] == pytest.approx(expected)
    assert row(found, "jaccard", "all heads")["shared"] == len(shared)


def test_rank_correlation_is_spearmans_with_ties_and_its_null_has_the_known_spread(drawn) -> None:
    a, b = np.round(drawn[0], 1), drawn[0] + drawn[1]  # ties in a
    found = agree([scores("a", a), scores("b", b)], permutations=DRAWS)
    told = row(found, "spearman", "all heads")
    assert told["observed"] == pytest.approx(stats.spearmanr(a.ravel(), b.ravel()).statistic, abs=1e-12)
    spread = 1 / np.sqrt(LAYERS * HEADS - 1)  # of Spearman's coefficient over all orders, also with ties
    assert abs(told["null_mean"]) < 4 * spread / np.sqrt(DRAWS)
    # normal at 48 heads; the standard error of a 2.5 % quantile of a normal sample is 2.67 / sqrt(draws) deviations
    assert told["null_high"] == pytest.approx(1.96 * spread, abs=spread * (4 * 2.67 / np.sqrt(DRAWS) + 0.03))
    assert told["p"] == pytest.approx(2 / (1 + DRAWS)) and found.matrix("spearman").loc["b", "a"] == told["observed"]


def test_depth_alone_is_agreement_over_all_heads_and_none_within_layers(drawn) -> None:
    late = 3.0 * np.arange(LAYERS)[:, None]
    found = agree([scores("a", drawn[0] + late), scores("b", drawn[1] + late)], k=K)
    for measure in ("spearman", "jaccard"):
        assert row(found, measure, "all heads")["p"] < 0.01 and row(found, measure, "within layers")["p"] > 0.05
    assert not list(found_alike(found))
    some = drawn[0] + 0.1 * late  # deep heads are higher, but not all of them
    same = agree([scores("a", some), scores("b", some**3)], k=K)
    assert len(list(found_alike(same))) == 1 and row(same, "jaccard", "within layers")["observed"] == 1.0


def test_a_p_value_keeps_its_promise() -> None:
    """Of methods that have nothing in common a tenth have a p of at most 0.1 (the statistic hardly ties)."""
    rng, below = np.random.default_rng(5), []
    for _ in range(150):
        a, b = rng.random((2, 4, 6))
        below.append(row(agree([scores("a", a), scores("b", b)], permutations=99), "spearman", "within layers")["p"])
    share, error = np.mean(np.array(below) <= 0.1 + 1e-9), np.sqrt(0.1 * 0.9 / 150)
    assert abs(share - 0.1) < 4 * error


def test_a_score_of_layers_is_shuffled_by_layers(drawn) -> None:
    """Its 48 equal-in-a-layer values are 6 observations: p cannot be below that of one order in 720."""
    depth = np.repeat(np.arange(LAYERS, dtype=float)[:, None], HEADS, axis=1)
    other = depth + 0.1 * drawn[0]
    layer = agree([scores("a", other), scores("b", depth, per="layer")], permutations=DRAWS)
    head = agree([scores("a", other), scores("b", depth)], permutations=DRAWS)
    assert row(head, "spearman", "all heads")["p"] == pytest.approx(2 / (1 + DRAWS))
    told = row(layer, "spearman", "all heads")
    assert 2 / 720 / 4 < told["p"] < 0.05 and told["null_high"] > 2 * row(head, "spearman", "all heads")["null_high"]
    assert row(layer, "spearman", "within layers")["p"] == row(layer, "jaccard", "within layers")["p"] == 1.0


def test_layers_without_scores_are_left_out_and_counted(drawn) -> None:
    holes = drawn.copy()
    holes[0, 2], holes[1, 4, 3] = np.nan, np.nan  # a layer without attention; one head without a trial
    found = agree([scores(n, x) for n, x in zip("abc", holes, strict=True)], k=5)
    assert found.left_out == (2, 4) and found.heads == (LAYERS - 2) * HEADS
    kept = np.delete(drawn, [2, 4], axis=1).reshape(3, -1)
    told = row(found, "spearman", "all heads")
    assert told["observed"] == pytest.approx(stats.spearmanr(kept[0], kept[1]).statistic)
    assert {layer for layer, _ in found.top("a")}.isdisjoint({2, 4})
    best = HeadScores("a", np.where(np.isin(np.arange(LAYERS), [2, 4])[:, None], np.nan, drawn[0])[None]).top(5)
    assert found.top("a").heads == best.heads
    ranks = found.ranks(5)
    assert ranks[ranks["a"] == 1]["head"].item() == "L{}H{}".format(*best[0])
    assert (np.sort(found.ranks(found.heads)["b"]) == np.arange(1, found.heads + 1)).all()


def test_a_constant_score_has_no_rank(drawn) -> None:
    found = agree([scores("a", np.ones((LAYERS, HEADS))), scores("b", drawn[0]), scores("c", drawn[0])])
    assert np.isnan(row(found, "spearman", "all heads")["p"]) and np.isnan(
        row(found, "spearman", "all heads")["p_holm"]
    )
    assert row(found, "spearman", "all heads", at=2)["p_holm"] == row(found, "spearman", "all heads", at=2)["p"]


def test_holm_and_shuffles_by_hand() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03])), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm(np.array([0.04, np.nan, 0.03])), [0.06, np.nan, 0.06])
    assert two_sided(5.0, np.arange(9.0)) == pytest.approx(2 * (1 + 4) / 10) and two_sided(9.0, np.arange(9.0)) == 0.2
    rng = np.random.default_rng(0)
    inside, whole, every = (orders(kind, 3, 4, 50, rng) for kind in ("within layers", "whole layers", "all heads"))
    for order in (inside, whole, every):
        assert (np.sort(order, axis=1) == np.arange(12)).all() and len(np.unique(order, axis=0)) > 5
    assert (inside // 4 == np.arange(12) // 4).all() and (whole % 4 == np.arange(12) % 4).all()


def test_what_cannot_be_compared_is_one_line(drawn) -> None:
    a, b = scores("a", drawn[0]), scores("b", drawn[1])
    for given, options, says in (
        ([a], {}, "two or more"),
        ([a, a], {}, "a name of its own"),
        ([a, scores("b", drawn[1][:3])], {}, "do not correspond"),
        ([a, b], {"k": 48}, "top 1 to 47"),
        ([a, b], {"permutations": 0}, "at least 1 shuffle"),
        ([a, scores("b", np.full((LAYERS, HEADS), np.nan))], {}, "nothing is compared"),
    ):
        with pytest.raises(HeadscopeError, match=says):
            agree(given, **options)
    assert len(repr(agree([a, b]))) < 120 and agree([a, a], names=["x", "y"]).names == ("x", "y")


def test_ties_for_the_last_places_are_nothing_shared() -> None:
    """Two sparse methods without a head in common: of K places, the rest is drawn from the heads that score 0."""
    a, b = np.zeros((2, LAYERS, HEADS))
    a[0, :3], b[5, 3:6] = 1.0, 1.0
    found, heads = agree([scores("a", a), scores("b", b)], k=K, permutations=DRAWS), LAYERS * HEADS
    share = (K - 3) / (heads - 3)  # of a place, each head that scores 0 has
    expected = 2 * 3 * share + (heads - 6) * share**2
    assert row(found, "jaccard", "all heads")["shared"] == pytest.approx(expected, abs=0.05)
    assert row(found, "jaccard", "all heads")["p"] > 0.05 and not list(found_alike(found))
    constant = agree([scores("a", a), scores("c", np.zeros_like(a))], k=K, permutations=99)
    assert row(constant, "jaccard", "all heads")["p"] == 1
    assert found.ranks(1)["a"].tolist().count(1) == 3
    assert list(found.top("a")) == [(0, 0), (0, 1), (0, 2)] and not len(found.shared("a", "b"))


def test_an_adjusted_p_can_be_small_whatever_the_number_of_methods() -> None:
    same = np.random.default_rng(0).random((LAYERS, HEADS))
    found = agree([scores(str(i), same) for i in range(12)], k=K)
    assert len(list(found_alike(found))) == 66
