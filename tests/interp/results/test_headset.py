"""Head sets: order, weights, and random controls of the same layers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet

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
