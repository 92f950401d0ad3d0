"""Kinds of heads: features against eager weights in float64, planted kinds, and what noise gives.

Tolerance of features: float32 patterns, 1e-6 of each weight and as much again for the sums: 1e-5 of masses, times the
length for distances, and of entropies, whose terms are larger by log n.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from sklearn.metrics import adjusted_rand_score

from headscope.interp.analysis.detectors import detected
from headscope.interp.analysis.features import FEATURES, head_features
from headscope.interp.analysis.taxonomy import Taxonomy, sort_heads, taxonomy
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.scores import HeadScores

LAYERS, HEADS = 6, 5
KIND = np.arange(LAYERS * HEADS) % 3  # of every head, as planted


def by_hand(ids: np.ndarray, p: np.ndarray) -> dict[str, np.ndarray]:
    """The features of one text (layer, head), from its tokens and its pattern (layer, head, query, key)."""
    n = len(ids)
    t, s = np.arange(n)[:, None], np.arange(n)[None]
    rows = slice(1, None)

    def mean(values: np.ndarray) -> np.ndarray:
        return values[..., rows].mean(-1)

    def on(mask: np.ndarray) -> np.ndarray:
        return mean((p * mask).sum(-1))

    earlier = [next((j for j in range(i - 1, -1, -1) if ids[j] == ids[i]), None) for i in range(n)]
    again = [(i, j) for i, j in enumerate(earlier) if j is not None]
    after = [(i, j + 1) for i, j in again if j + 1 < i]
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)

    def picked(pairs: list[tuple[int, int]]) -> np.ndarray:
        return np.mean([p[:, :, i, j] for i, j in pairs], axis=0)

    return {
        "entropy": mean(entropy),
        "max_weight": mean(p.max(-1)),
        "distance": mean((p * (t - s)).sum(-1)),
        "first_token": on(s == 0),
        "sink_mass": on(s < 4),
        "self": on(s == t),
        "previous": on(s == t - 1),
        "duplicate": picked(again),
        "induction": picked(after),
        "near_mass": on(s > t - 8),
        "local_mass": on(s > t - 32),
    }


def test_features_are_those_of_eager_weights(worded, words, dense) -> None:
    found = head_features(worded, words, length=36)
    assert found.dims == ("example", "layer", "head", "feature") and found.shape == (6, 2, 4, len(FEATURES))
    ids, weights = dense(worded, words, 36)
    for example in range(6):
        wanted = by_hand(ids[example], weights[example])
        assert list(wanted) == list(FEATURES)
        for name, values in wanted.items():
            size = 36 if name == "distance" else np.log(36) if name == "entropy" else 1
            np.testing.assert_allclose(found[example].sel(feature=name), values, rtol=0, atol=1e-5 * size, err_msg=name)
            assert values.std() > 100 * 1e-5, name  # another head's values would be seen


def test_a_text_without_repetition_has_no_earlier_occurrence(worded) -> None:
    texts = [" ".join(f"w{i}" for i in range(20)), "w1 w1 w1 w2 " + " ".join(f"w{i}" for i in range(3, 19))]
    found = head_features(worded, texts, length=20)
    earlier = found.sel(feature="duplicate").to_numpy()
    assert np.isnan(earlier[0]).all() and np.isfinite(earlier[1]).all()
    assert np.isnan(found.sel(feature="induction")).all()  # the word after "w1" is the query itself
    frame = sort_heads(found, clusters=2, draws=2).to_frame()
    assert frame["induction"].isna().all() and frame["duplicate"].notna().all()
    alone = head_features(worded, " ".join(texts), length=20)  # one text: windows
    np.testing.assert_allclose(alone, found, rtol=0, atol=1e-12)


def planted(noise: float, examples: int = 8, seed: int = 0) -> xr.DataArray:
    """Heads of three kinds: 0 on the previous token and near, 1 on the first token, 2 broad."""
    rng = np.random.default_rng(seed)
    values = np.full((examples, LAYERS * HEADS, len(FEATURES)), 0.3)
    index = list(FEATURES)
    for kind, raised in enumerate((("previous", "near_mass"), ("first_token",), ("entropy", "distance"))):
        for name in raised:
            values[:, kind == KIND, index.index(name)] = 0.9
    values += noise * rng.standard_normal(values.shape)
    shaped = values.reshape(examples, LAYERS, HEADS, -1)
    coordinates = {"layer": np.arange(LAYERS) + 2, "feature": index}  # the first layers do not attend
    return xr.DataArray(shaped, coordinates, ("example", "layer", "head", "feature"))


@pytest.mark.parametrize("method", ["agglomerative", "kmeans"])
def test_planted_kinds_are_found_and_named(method) -> None:
    found = sort_heads(planted(0.1), method=method, draws=40)
    assert adjusted_rand_score(found.labels.ravel(), KIND) == 1
    of = {KIND[np.flatnonzero(found.labels.ravel() == c)[0]]: one for c, one in enumerate(found.clusters)}
    assert [one.heads for one in found.clusters] == [10, 10, 10]
    assert set(of[0].name.split(", ")) & {"previous token", "last 8 tokens"}
    assert of[1].name.startswith("first token") and set(of[2].name.split(", ")) & {"broad", "far"}
    for c, one in enumerate(found.clusters):
        assert found.labels[one.medoid[0] - 2, one.medoid[1]] == c
    assert found.stability is not None
    # six features are noise, as wide as the others once standardised: a head may stray in some draw
    assert min(found.stability.resampled[0], found.stability.halves[0]) > 0.9 and found.stability.null[2] < 0.2
    assert found.silhouette > found.shuffled[2] and max(found.silhouettes, key=found.silhouettes.get) == 3
    frame = found.to_frame()
    assert len(frame) == 30 and frame["medoid"].sum() == 3 and frame["layer"].min() == 2
    assert repr(found).startswith("Taxonomy(30 heads in 3 clusters: 10 ") and "\n" not in repr(found)


def test_noise_is_neither_stable_nor_apart() -> None:
    """Features that are drawn anew for every text: halves agree as permuted labels do, within the spread of the
    means of 40 draws, and clusters are as near each other as those of shuffled features."""
    rng = np.random.default_rng(5)
    values = planted(0).copy(data=rng.standard_normal((8, LAYERS, HEADS, len(FEATURES))))
    found = sort_heads(values, clusters=3, draws=40)
    assert found.stability is not None
    assert found.stability.halves[0] < found.stability.null[2] + 0.1
    assert found.shuffled[1] <= found.silhouette <= found.shuffled[2] + 0.02


def test_seeded_and_names_are_different() -> None:
    features = planted(0.3)
    one, two = (sort_heads(features, clusters=9, method="kmeans", draws=5) for _ in range(2))
    assert one.stability == two.stability and np.array_equal(one.labels, two.labels)
    names = [cluster.name for cluster in one.clusters]
    assert len(set(names)) == 9
    alone = sort_heads(features.isel(example=[0]), clusters=2, draws=2)
    assert alone.stability is None


def scores_of(values: np.ndarray, method: str = "planted") -> HeadScores:
    full = np.full((3, LAYERS + 2, HEADS), np.nan)
    full[:, 2:] = values.reshape(LAYERS, HEADS)
    return HeadScores(method, full)


def test_detectors_beside_clusters() -> None:
    found = sort_heads(planted(0.1), draws=2)
    rng = np.random.default_rng(1)
    noisy = (KIND == 1) + rng.standard_normal(30)
    table = detected(found, [scores_of((KIND == 1) * 1.0), scores_of(noisy, "noisy"), scores_of(np.ones(30), "same")])
    first = table[table["method"] == "planted"].set_index("cluster")
    sinks = int(np.bincount(found.labels.ravel()[KIND == 1]).argmax())
    assert first["eta_squared"].iloc[0] == pytest.approx(1) and first["p"].iloc[0] == pytest.approx(1 / 1001)
    assert first["auc"][sinks] == 1 and first["mean"][sinks] == 1 and first["heads"].sum() == 30
    groups = [noisy[KIND == kind] for kind in range(3)]
    between = sum(len(x) * (x.mean() - noisy.mean()) ** 2 for x in groups) / ((noisy - noisy.mean()) ** 2).sum()
    second = table[table["method"] == "noisy"].set_index("cluster")
    assert second["eta_squared"].iloc[0] == pytest.approx(between)
    above = np.mean([[(a > b) + 0.5 * (a == b) for b in noisy[KIND != 1]] for a in noisy[KIND == 1]])
    assert second["auc"][sinks] == pytest.approx(above)
    # of permuted labels the mean of eta squared is (k - 1) / (n - 1), here 2 / 29
    assert second["null_mean"].iloc[0] == pytest.approx(2 / 29, abs=0.01)
    assert table[table["method"] == "same"][["eta_squared", "p"]].isna().all(axis=None)
    with pytest.raises(HeadscopeError, match="same model"):
        detected(found, [HeadScores("other", np.zeros((1, 4, HEADS)))])


def test_saved_and_read_back(worded, words, tmp_path: Path) -> None:
    found = taxonomy(worded, words, length=30, clusters=3, draws=3, out=tmp_path)
    again = Taxonomy.load(tmp_path)
    xr.testing.assert_equal(again.features, found.features)
    assert again.clusters == found.clusters and again.stability == found.stability
    assert again.shuffled == found.shuffled and again.silhouettes == found.silhouettes
    assert again.provenance == found.provenance and again.provenance["parameters"]["texts"]
    assert len((tmp_path / "taxonomy.csv").read_text().splitlines()) == 9
    document = json.loads((tmp_path / "taxonomy.json").read_text())
    document["labels"][0][0] += 1
    (tmp_path / "taxonomy.json").write_text(json.dumps(document))
    with pytest.raises(HeadscopeError, match="changed after"):
        Taxonomy.load(tmp_path)
    with pytest.raises(HeadscopeError, match="headscope taxonomy"):
        Taxonomy.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("given", "said"),
    [({"method": "x"}, "method="), ({"clusters": 8}, "2 to 7"), ({"draws": 0}, "draws=0"), ({"length": 2}, "length=2")],
)
def test_bad_settings_are_one_line(worded, words, given: dict, said: str) -> None:
    with pytest.raises(HeadscopeError, match=said) as error:
        taxonomy(worded, words, **{"length": 20, **given})
    assert "\n" not in str(error.value)


def test_heads_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(HeadscopeError, match="cannot be sorted"):
        sort_heads(planted(0).copy(data=np.ones((8, LAYERS, HEADS, len(FEATURES)))))


@pytest.mark.slow
def test_smollm2_kinds_are_stable_over_texts(smollm2) -> None:
    """Half of the texts give the clusters of the other half far better than chance, and L17H3, an induction head, is in
    a cluster that looks after earlier occurrences more than the mean head. (L18H6, the strongest on repeated random
    tokens, is not: on prose it does other things.)"""
    found = taxonomy(smollm2, draws=8)
    assert found.stability is not None and found.stability.halves[1] > found.stability.null[2]
    assert found.silhouette > found.shuffled[2]
    assert found.clusters[found.labels[17, 3]].centre["induction"] > 0.5
