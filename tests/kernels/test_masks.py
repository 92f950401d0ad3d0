"""The mask rules against their definition, one (query, key) pair at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.kernels.checks.cases import MASKS, random_mask
from headscope.kernels.masks import Mask
from headscope.kernels.reference import dense_mask
from headscope.kernels.streaming.counts import count_queries

BATCH, HEADS = 3, 2


def visible(mask: Mask, b: int, h: int, i: int, j: int) -> bool:
    """The docstring of ``Mask``, read aloud."""

    def of(x: torch.Tensor) -> int:
        return int(x[b if x.shape[0] > 1 else 0])

    q, k = mask.query_offset + i, mask.key_offset + j
    if mask.right is not None and k > q + mask.right:
        return False
    if mask.left is not None and k < q - mask.left:
        return False
    if mask.start is not None and k < of(mask.start):
        return False
    if mask.end is not None and k >= of(mask.end):
        return False
    if mask.chunk is not None:
        origin = 0 if mask.origin is None else of(mask.origin)
        if (k - origin) // mask.chunk != (q - origin) // mask.chunk:
            return False
    if mask.segments is not None:
        row = mask.segments[b if mask.segments.shape[0] > 1 else 0]
        if row[k] != row[q]:
            return False
    if mask.rule is not None:
        asked = (torch.tensor(x) for x in (b, h, q, k))
        return bool(mask.rule(*asked))
    return True


def by_pairs(mask: Mask, queries: int, keys: int) -> torch.Tensor:
    return torch.tensor(
        [
            [[[visible(mask, b, h, i, j) for j in range(keys)] for i in range(queries)] for h in range(HEADS)]
            for b in range(BATCH)
        ]
    )


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("queries, keys", [(1, 9), (7, 7), (5, 12)])
def test_tile_is_the_rule_pair_by_pair(kind: str, queries: int, keys: int) -> None:
    mask = random_mask(kind, BATCH, queries, keys)
    seen = dense_mask(mask, torch.Size((BATCH, HEADS, queries, 8)), keys, torch.device("cpu"))
    assert torch.equal(seen, by_pairs(mask, queries, keys))


@pytest.mark.parametrize("kind", MASKS)
def test_no_key_outside_the_bounds_is_visible(kind: str) -> None:
    queries, keys = 11, 17
    mask = random_mask(kind, BATCH, queries, keys)
    seen = by_pairs(mask, queries, keys).any(0).any(0)
    for q0 in range(queries):
        for q1 in range(q0 + 1, queries + 1):
            lo, hi = mask.key_bounds(q0, q1, keys)
            assert not seen[q0:q1, :lo].any() and not seen[q0:q1, hi:].any()


@pytest.mark.parametrize("kind", MASKS)
def test_one_example_of_a_batch_keeps_its_mask(kind: str) -> None:
    queries, keys = 6, 10
    mask = random_mask(kind, BATCH, queries, keys)
    whole = by_pairs(mask, queries, keys)
    for b in range(BATCH):
        one = mask.select_batch(b, b + 1)
        seen = dense_mask(one, torch.Size((1, HEADS, queries, 8)), keys, torch.device("cpu"))
        assert torch.equal(seen[0], whole[b])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("rows", [(0, 7), (3, 6), (2, 2)])
def test_counts_are_the_mask_summed_over_real_queries(kind: str, rows: tuple[int, int]) -> None:
    queries, keys = 7, 12
    mask = random_mask(kind, BATCH, queries, keys)
    seen = by_pairs(mask, queries, keys)
    real = mask.query_is_real(torch.arange(queries))
    if real is not None:
        seen = seen & real[:, None, :, None]
    want = seen[:, :, rows[0] : rows[1]].sum(2)
    got = count_queries(mask, torch.zeros(BATCH, HEADS, queries, 4), keys, rows)
    assert torch.equal(got.expand_as(want), want)


@settings(max_examples=60, deadline=None)
@given(
    offsets=st.tuples(st.integers(-6, 12), st.integers(0, 6)),
    left=st.none() | st.integers(0, 9),
    right=st.none() | st.integers(-2, 9),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    data=st.data(),
)
def test_any_band_with_padding_counts_and_bounds(
    offsets: tuple[int, int], left: int | None, right: int | None, shape: tuple[int, int], data: st.DataObject
) -> None:
    ends = st.none() | st.lists(st.integers(-2, 20), min_size=BATCH, max_size=BATCH).map(torch.tensor)
    mask = Mask(*offsets, left=left, right=right, start=data.draw(ends), end=data.draw(ends))
    want = by_pairs(mask, *shape)
    seen = dense_mask(mask, torch.Size((BATCH, HEADS, shape[0], 8)), shape[1], torch.device("cpu"))
    assert torch.equal(seen, want)
    lo, hi = mask.key_bounds(0, *shape)
    assert not want[..., :lo].any() and not want[..., hi:].any()
    real = mask.query_is_real(torch.arange(shape[0]))
    want = want if real is None else want & real[:, None, :, None]
    got = count_queries(mask, torch.zeros(BATCH, HEADS, shape[0], 4), shape[1], (0, shape[0]))
    assert torch.equal(got.expand_as(want.sum(2)), want.sum(2))
