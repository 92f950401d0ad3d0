"""Head sets: order, weights, and random controls of the same layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores

LAYERS, HEADS = 4, 8
pairs = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, HEADS - 1))


def test_order_and_weights_are_kept() -> None:
    heads = HeadSet(((2, 1), (0, 3), (2, 0)), (0.9, 0.5, 0.1), name="mine")
    assert list(heads) == [(2, 1), (0, 3), (2, 0)] and heads.weights == (0.9, 0.5, 0.1)
    assert heads.by_layer() == {2: [1, 0], 0: [3]}
    assert len(heads) == 3 and (0, 3) in heads and (3, 0) not in heads


def test_pairs_become_plain_integers_of_weight_one() -> None:
    heads = HeadSet.of(np.array([[1, 2], [0, 1]]))  # type: ignore[arg-type]
    assert list(heads) == [(1, 2), (0, 1)] and heads.weights == (1.0, 1.0)
    assert all(type(number) is int for pair in heads for number in pair)
    assert HeadSet.of(heads) is heads


def test_contradictions_are_refused() -> None:
    with pytest.raises(HeadscopeError, match="'mine' names a head twice"):
        HeadSet(((0, 1), (0, 1)), name="mine")
    with pytest.raises(HeadscopeError, match="2 heads but 1 weights"):
        HeadSet(((0, 1), (0, 2)), (1.0,))


@pytest.mark.parametrize("head", [(LAYERS, 0), (0, HEADS), (-1, 0), (0, -1)])
def test_heads_that_do_not_exist(head: tuple[int, int]) -> None:
    with pytest.raises(HeadscopeError, match=rf"L{head[0]}H{head[1]} does not exist: .*layers 0-3 and heads 0-7"):
        HeadSet.of([(0, 0), head]).check(LAYERS, HEADS)


def test_heads_that_exist() -> None:
    HeadSet.of([(layer, head) for layer in range(LAYERS) for head in range(HEADS)]).check(LAYERS, HEADS)


@given(st.lists(pairs, unique=True, max_size=12), st.lists(pairs, max_size=4), st.integers(0, 1000))
def test_matched_random_is_of_the_same_layers_and_of_other_heads(heads, exclude, seed) -> None:
    mine = HeadSet.of(heads)
    room = {layer: HEADS - len({h for at, h in [*heads, *exclude] if at == layer}) for layer, _ in heads}
    if any(room[layer] < len(own) for layer, own in mine.by_layer().items()):
        with pytest.raises(HeadscopeError, match="heads left for a control of"):
            mine.matched_random(HEADS, seed, exclude=exclude)
        return
    drawn = mine.matched_random(HEADS, seed, exclude=exclude)
    drawn.check(LAYERS, HEADS)
    assert not set(drawn) & {*heads, *exclude}
    assert {layer: len(own) for layer, own in drawn.by_layer().items()} == {
        layer: len(own) for layer, own in mine.by_layer().items()
    }
    assert drawn == mine.matched_random(HEADS, seed, exclude=exclude)


def test_controls_are_uniform_over_the_other_heads() -> None:
    """Chi-squared over 2,000 seeds; a p below 0.001 would reject one correct generator in a thousand (seeds fixed)."""
    mine = HeadSet.of([(1, 0), (1, 5)])
    counts = np.zeros(HEADS)
    for seed in range(2000):
        for _, head in mine.matched_random(HEADS, seed):
            counts[head] += 1
    assert counts[0] == counts[5] == 0
    assert stats.chisquare(np.delete(counts, [0, 5])).pvalue > 1e-3


def test_a_layer_without_other_heads_is_named() -> None:
    with pytest.raises(HeadscopeError, match="layer 2 has 3 heads left for a control of 5; choose fewer heads there"):
        HeadSet.of([(2, head) for head in range(5)]).matched_random(HEADS, 0)


@pytest.mark.parametrize(
    "given",
    ["L18H6,L17H3", "l18h6, 17.3", ["L18H6", "L17H3"], [(18, 6), "17.3"], ((18, 6), (17, 3)), [[18, 6], [17, 3]]],
)
def test_heads_by_name_or_number(given: Any) -> None:
    assert list(HeadSet.of(given)) == [(18, 6), (17, 3)]


def test_one_head() -> None:
    assert list(HeadSet.of("L18H6")) == list(HeadSet.of((18, 6))) == list(HeadSet.of(np.array([18, 6]))) == [(18, 6)]
    assert list(HeadSet.of(torch.tensor([18, 6]))) == list(HeadSet.of(torch.tensor([[18, 6]]))) == [(18, 6)]


@pytest.mark.parametrize(
    "given",
    [
        "",
        "18",
        "L18",
        "L18H6 L17H3",
        [18],
        [(1, 2, 3)],
        (1, 2, 3),
        7,
        None,
        [(0.5, 1)],
        [(True, 1)],
        b"ab",
        np.array([[0.5, 1], [2, 3]]),
    ],
)
def test_what_names_no_heads_is_refused_in_one_line(given: Any) -> None:
    with pytest.raises(HeadscopeError, match="names no heads") as error:
        HeadSet.of(given)
    assert "\n" not in str(error.value)


def test_sets_keep_the_lefts_order_and_weights() -> None:
    a, b = HeadSet(((2, 1), (0, 3), (2, 0)), (0.9, 0.5, 0.1), "a"), HeadSet(((2, 0), (5, 5), (0, 3)), (7.0, 8.0, 9.0))
    assert (a | b) == HeadSet(((2, 1), (0, 3), (2, 0), (5, 5)), (0.9, 0.5, 0.1, 8.0), "a")
    assert (a & b) == HeadSet(((0, 3), (2, 0)), (0.5, 0.1), "a")
    assert (a - b) == HeadSet(((2, 1),), (0.9,), "a")
    assert (a & "L0H3").heads == ((0, 3),) and len(a - a) == 0 and len(a & b - a) == 0
    assert a[0] == (2, 1) and a[-1] == (2, 0) and a[:2] == HeadSet(((2, 1), (0, 3)), (0.9, 0.5), "a")
    assert a[::-1].weights == (0.1, 0.5, 0.9) and len(a[5:]) == 0


@given(st.lists(pairs, unique=True), st.lists(pairs, unique=True))
def test_sets_are_those_of_the_pairs(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    a, b = HeadSet(tuple(left)), HeadSet(tuple(right))
    assert set(a | b) == set(left) | set(right) and set(a & b) == set(left) & set(right)
    assert set(a - b) == set(left) - set(right)
    assert len(repr(a)) <= 80 and (not left or repr(a).startswith(f"HeadSet(L{left[0][0]}H{left[0][1]}"))


def test_saved_and_loaded(tmp_path: Path) -> None:
    heads = HeadSet(((2, 1), (0, 3)), (0.25, 1 / 3), "mine")
    assert HeadSet.load(heads.save(tmp_path / "new" / "heads.json")) == heads
    assert HeadSet.load(HeadSet(()).save(tmp_path / "none.json")) == HeadSet(())


def test_a_head_score_file_is_a_head_set(tmp_path: Path) -> None:
    trials = np.array([[[0.1, 0.9, np.nan], [0.3, -1.0, 0.2]]])
    loaded = HeadSet.load(HeadScores("m", trials).save(tmp_path))
    assert list(loaded) == [(0, 1), (1, 0), (1, 2), (0, 0), (1, 1)] and loaded.name == "m"
    assert loaded.weights == (0.9, 0.3, 0.2, 0.1, -1.0)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "3", '{"format": 1, "kind": "headscope heads", "heads": [[0, 1]]}']
)
def test_foreign_files_hold_no_heads(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(HeadscopeError, match="holds no heads"):
        HeadSet.load(tmp_path / "a.json")
    with pytest.raises(HeadscopeError, match="holds no heads"):
        HeadSet.load(tmp_path / "nothing.json")


def test_scores_are_shown_short_and_as_a_picture() -> None:
    scores = HeadScores("induction", np.linspace(-0.5, 1.0, 2 * 24 * 16).reshape(2, 24, 16))
    assert repr(scores) == "HeadScores('induction', 24 layers x 16 heads, 2 trials, best L23H15 0.625)"
    picture = ElementTree.fromstring(scores._repr_html_())
    cells = [x for x in picture.iter() if x.tag.endswith("rect")]
    assert len(cells) == 24 * 16 and cells[-1][0].text == "L23H15: 0.625"
    assert cells[-1].get("fill") == "#b2182b"  # ColorBrewer's red at the largest absolute value
    plain = ElementTree.fromstring(HeadScores("<m>", np.array([[[0.0, 1.0, np.nan]]]))._repr_html_())
    assert [x.get("fill") for x in plain.iter() if x.tag.endswith("rect")] == ["#440154", "#fde725", "#9aa5b1"]
    assert "no score" in repr(HeadScores("m", np.full((1, 1, 1), np.nan)))
