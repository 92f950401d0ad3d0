"""From lists of keys that may be among the heaviest to the heaviest, in order: what follows ``hopper.heaviest``.

1. Lists that are full may lack keys: the rows of a program with such a list are searched anew, by ``insert``. That is
   rare: it takes many equal scores, or heavy keys at steps of the tile.
2. The largest of what is listed, the largest of the rest, and so on; p = exp(s - lse).
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.triton.device import (
    FLOOR,
    HIDDEN,
    LOG2E,
    last_dim_contiguous,
    launch,
    load_rows,
    padded,
    signed,
    strides,
)
from headscope.kernels.triton.heaviest import Sizes, insert, tile_scores
from headscope.kernels.triton.masks import key_range, row_positions

LISTS = tl.constexpr(4)  # of a row


class Room(NamedTuple):
    """Scores, as bits, and keys (batch, head, row, list, place, 2) int32, and how many (batch, head, row, list)."""

    found: Tensor
    counts: Tensor


@triton.jit
def _anew(
    q,
    k,
    found,
    counts,
    strides,
    sizes,
    rules,
    score,
    unit,
    d: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    ROOM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    b, h = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    begin = tl.program_id(0) * BM
    i = begin + tl.arange(0, BM)
    exists = i < sizes.rows
    row = (b64 * sizes.heads + h64) * sizes.rows + i
    part = tl.arange(0, LISTS)
    at_counts = counts + row[:, None] * LISTS + part[None, :]
    filled = tl.load(at_counts, mask=exists[:, None] & (part < LISTS)[None, :], other=0)
    if tl.max(tl.max(filled, 1), 0) >= ROOM:
        q += b64 * strides[0].batch + h64 * strides[0].head
        k += b64 * strides[1].batch + (h // sizes.group).to(tl.int64) * strides[1].head
        qt = signed(load_rows(q, i, strides[0].position, sizes.rows, d, D, False), score)
        position = row_positions(tl.where(exists, i, 0), rules)
        first = row_positions(begin, rules)
        last = row_positions(tl.minimum(begin + BM, sizes.rows) - 1, rules)
        lo, hi, _, _ = key_range(first, last, b, sizes.keys, rules, BN)
        j, place = tl.arange(0, BN), tl.arange(0, K)
        kept = tl.full([BM, K], FLOOR, tl.float32)
        keys = tl.full([BM, K], -1, tl.int32)
        worst, out = tl.min(kept, 1, return_indices=True)
        for tile in range(0, tl.cdiv(hi - lo, BN)):
            start = lo + tile * BN
            s = tile_scores(qt, k, start, b, h, position, strides[1].position, sizes, rules, score, d, D, BN, True)
            kept, keys, worst, out = insert(s, start, j, place, kept, keys, worst, out)
        at = found + row[:, None] * (2 * LISTS * ROOM) + place[None, :] * 2
        tl.store(at, (kept / unit).to(tl.int32, bitcast=True), mask=exists[:, None])
        tl.store(at + 1, keys, mask=exists[:, None])
        full = tl.where(part == 0, K, 0)[None, :] + tl.zeros([BM, LISTS], tl.int32)
        tl.store(at_counts, full, mask=exists[:, None])


@triton.jit
def _kernel(
    found,
    counts,
    lse,
    mass,
    keys_at,
    rows,
    top,
    key_offset,
    unit,
    ROOM: tl.constexpr,
    ALL: tl.constexpr,
    BM: tl.constexpr,
):
    """One warp of 32 rows: a thread holds all that is listed of its row, and asks no other for the largest."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    exists = row < rows
    place = tl.arange(0, ALL)
    filled = tl.load(counts + row[:, None] * LISTS + place[None, :] // ROOM, mask=exists[:, None], other=0)
    here = exists[:, None] & (place[None, :] % ROOM < filled)
    at = found + row[:, None] * (2 * ALL) + place[None, :] * 2
    kept = tl.load(at, mask=here, other=0).to(tl.float32, bitcast=True)
    kept = tl.where(here, kept * unit, FLOOR)
    norm = tl.load(lse + row, mask=exists, other=0.0)
    norm = tl.where(norm == float("-inf"), float("inf"), norm * LOG2E)
    for n in range(0, top):
        most, where = tl.max(kept, 1, return_indices=True)
        kept = tl.where(place[None, :] == where[:, None], HIDDEN, kept)
        p = tl.where(most > FLOOR, tl.exp2(most - norm), 0.0)
        key = tl.load(found + row * (2 * ALL) + where * 2 + 1, mask=exists & (p > 0.0), other=0)
        tl.store(mass + row * top + n, p, mask=exists)
        tl.store(keys_at + row * top + n, tl.where(p > 0.0, key + key_offset, -1).to(tl.int64), mask=exists)


def room(q: Tensor, count: int) -> Room:
    """Room for the lists of ``count`` keys of every row of ``q`` (batch, head, row, d).

    Of 64 buckets, 18 keys reach the 16th largest (``triton.heaviest``), and none of four lists has 16 of them; of 128,
    37 reach the 32nd.
    """
    places = 16 if count <= 16 else 32
    shape = (*q.shape[:3], LISTS.value)
    options: dict[str, Any] = {"dtype": torch.int32, "device": q.device}
    return Room(torch.empty(*shape, places, 2, **options), torch.empty(*shape, **options))


def heaviest(
    q: Tensor, k: Tensor, lse: Tensor, lists: Room, sizes: Sizes, seen: Any, given: Any
) -> tuple[Tensor, Tensor]:
    """Masses and positions (batch, head, row, count) of the heaviest keys, from their ``lists``.

    ``given`` is the kernels' ``score``. Where it is a scale alone, the listed scores are products still to be scaled.
    """
    batch, heads, n, d = q.shape
    mass = torch.empty(batch, heads, n, sizes.top, dtype=torch.float32, device=q.device)
    keys_at = torch.empty(mass.shape, dtype=torch.int64, device=q.device)
    plain = given.softcap is None and given.bias is None
    unit, places, width = given.scale * LOG2E.value if plain else 1.0, lists.found.shape[4], padded(d)
    q, k = last_dim_contiguous(q), last_dim_contiguous(k)
    # one warp of few rows: they wait for each other at every key that one of them inserts
    tile = {"d": d, "D": width, "K": 1 << (sizes.top - 1).bit_length(), "ROOM": places, "BM": 16, "BN": 64}
    at = strides(q), strides(k)
    grid = (triton.cdiv(n, 16), batch * heads)
    launch(_anew, grid, q, q, k, *lists, at, sizes, seen, given, unit, **tile, num_warps=1, num_stages=2)
    rows, all_ = batch * heads * n, LISTS.value * places
    numbers = rows, sizes.top, seen.key_offset, unit
    tile = {"ROOM": places, "ALL": all_, "BM": 32}
    launch(_kernel, (triton.cdiv(rows, 32),), q, *lists, lse.contiguous(), mass, keys_at, *numbers, **tile, num_warps=1)
    return mass, keys_at
