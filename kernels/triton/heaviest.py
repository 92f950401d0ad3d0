"""The heaviest keys of every query from the lse, where a program holds queries of one head: two walks over the keys.

1. Key j falls into bucket j mod ``BN``. The first walk keeps each bucket's largest score: one maximum a score.
2. The K-th largest of these is no larger than the K-th largest score, for K buckets hold K keys that reach it. Of many
   scores in random order about BN ln(BN / (BN - K)) do: 18 for K = 16 of 64 buckets.
3. The second walk lists the keys that reach it (lowered by a rounding, so that none is lost to it), in order. A list
   has room for twice K or more; where a row of the program has more, ``insert`` finds them all anew, so the result is
   exact for any scores.
4. The list is sorted at the end, and p = exp(s - lse).
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.triton import tuning
from headscope.kernels.triton.device import (
    FLOOR,
    HIDDEN,
    LOG2E,
    PARTS,
    WHOLE,
    biased,
    last_dim_contiguous,
    launch,
    load_rows,
    padded,
    score,
    scored,
    signed,
    strides,
)
from headscope.kernels.triton.masks import key_range, row_positions, rules, visible

MOST_KEYS = 4096  # between the lengths that were measured


class Sizes(NamedTuple):
    """The shape of a call of ``rows`` query rows that asks for the ``top`` keys."""

    heads: int
    group: int
    rows: int
    keys: int
    top: int


@triton.jit
def insert(s, start, j, place, kept, keys, worst, out):
    """Put what beats the worst of a row's list in its place, the largest score of a tile first; the lists."""
    top, where = tl.max(s, 1, return_indices=True)
    better = top > worst
    while tl.max(better.to(tl.int32), 0) > 0:
        here = better[:, None] & (place[None, :] == out[:, None])
        kept = tl.where(here, top[:, None], kept)
        keys = tl.where(here, (start + where)[:, None], keys)
        worst, out = tl.min(kept, 1, return_indices=True)
        s = tl.where(better[:, None] & (j[None, :] == where[:, None]), HIDDEN, s)
        top, where = tl.max(s, 1, return_indices=True)
        better = top > worst
    return kept, keys, worst, out


@triton.jit
def put_in_order(kept, keys, place, lse, mass, keys_at, row, exists, top, key_offset):
    """Of every row's list (row, place), in any order, the ``top`` heaviest, one after the other."""
    norm = tl.load(lse + row, mask=exists, other=0.0)
    norm = tl.where(norm == float("-inf"), float("inf"), norm * LOG2E)
    for n in range(0, top):
        most, where = tl.max(kept, 1, return_indices=True)
        chosen = place[None, :] == where[:, None]
        key = tl.sum(tl.where(chosen, keys, 0), 1)
        kept = tl.where(chosen, HIDDEN, kept)
        p = tl.where(most > FLOOR, tl.exp2(most - norm), 0.0)
        key = tl.where(p > 0.0, key + key_offset, -1)
        tl.store(mass + row * top + n, p, mask=exists)
        tl.store(keys_at + row * top + n, key.to(tl.int64), mask=exists)


@triton.jit
def tile_scores(
    qt,
    k,
    start,
    b,
    h,
    position,
    stride,
    sizes,
    rules,
    score,
    d: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores of a tile (row, key)."""
    j = tl.arange(0, BN)
    kt = load_rows(k + start.to(tl.int64) * stride, j, stride, sizes.keys - start, d, D, not MASKED)
    s = scored(tl.dot(qt, tl.trans(kt), input_precision=PARTS if D <= 128 else WHOLE), score)
    s = biased(s, score, b, h, (start + j)[None, :], sizes.keys)
    if MASKED:
        seen = visible(position, start + j + rules.key_offset, b, rules) & (start + j < sizes.keys)[None, :]
        s = tl.where(seen, s, HIDDEN)
    return s


@triton.jit
def _kernel(
    q,
    k,
    lse,
    found,
    found_keys,
    mass,
    keys_at,
    strides,
    sizes,
    rules,
    score,
    d: tl.constexpr,
    D: tl.constexpr,
    ROOM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    b, h = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i = begin + tl.arange(0, BM)
    exists = i < sizes.rows
    q += b64 * strides[0].batch + h64 * strides[0].head
    k += b64 * strides[1].batch + (h // sizes.group).to(tl.int64) * strides[1].head
    qt = signed(load_rows(q, i, strides[0].position, sizes.rows, d, D, False), score)
    position = row_positions(tl.where(exists, i, 0), rules)
    first = row_positions(begin, rules)
    last = row_positions(tl.minimum(begin + BM, sizes.rows) - 1, rules)
    lo, hi, full_lo, full_hi = key_range(first, last, b, sizes.keys, rules, BN)
    step = strides[1].position

    j = tl.arange(0, BN)
    most = tl.full([BM, BN], HIDDEN, tl.float32)
    for masked in tl.static_range(0, 2):
        if masked:
            before = (full_lo - lo) // BN
            tiles = before + tl.cdiv(hi - full_hi, BN)
        else:
            before = 0
            tiles = (full_hi - full_lo) // BN
        for tile in range(0, tiles):
            if masked:
                start = tl.where(tile < before, lo + tile * BN, full_hi + (tile - before) * BN)
            else:
                start = full_lo + tile * BN
            s = tile_scores(qt, k, start, b, h, position, step, sizes, rules, score, d, D, BN, masked == 1)
            most = tl.maximum(most, s)
    for _ in range(1, sizes.top):
        _top, where = tl.max(most, 1, return_indices=True)
        most = tl.where(j[None, :] == where[:, None], HIDDEN, most)
    enough = tl.max(most, 1)
    enough = tl.maximum(enough - tl.abs(enough) * 1e-6, FLOOR)

    row = (b64 * sizes.heads + h64) * sizes.rows + i
    list_at = row * ROOM
    filled = tl.zeros([BM], tl.int32)
    for masked in tl.static_range(0, 2):
        if masked:
            before = (full_lo - lo) // BN
            tiles = before + tl.cdiv(hi - full_hi, BN)
        else:
            before = 0
            tiles = (full_hi - full_lo) // BN
        for tile in range(0, tiles):
            if masked:
                start = tl.where(tile < before, lo + tile * BN, full_hi + (tile - before) * BN)
            else:
                start = full_lo + tile * BN
            s = tile_scores(qt, k, start, b, h, position, step, sizes, rules, score, d, D, BN, masked == 1)
            hit = ((s >= enough[:, None]) & exists[:, None]).to(tl.int32)
            more = tl.sum(hit, 1)
            if tl.max(more, 0) > 0:
                at = filled[:, None] + tl.cumsum(hit, 1) - 1
                room = (hit > 0) & (at < ROOM)
                tl.store(found + list_at[:, None] + at, s, mask=room)
                tl.store(found_keys + list_at[:, None] + at, start + j[None, :] + 0 * at, mask=room)
                filled += more

    place = tl.arange(0, ROOM)
    tl.debug_barrier()  # the lists were written by other threads than read them
    here = exists[:, None] & (place[None, :] < filled[:, None])
    kept = tl.load(found + list_at[:, None] + place[None, :], mask=here, other=FLOOR)
    keys = tl.load(found_keys + list_at[:, None] + place[None, :], mask=here, other=-1)
    if tl.max(filled, 0) > ROOM:
        kept = tl.full([BM, ROOM], FLOOR, tl.float32)
        keys = tl.full([BM, ROOM], -1, tl.int32)
        worst, out = tl.min(kept, 1, return_indices=True)
        for tile in range(0, tl.cdiv(hi - lo, BN)):
            start = lo + tile * BN
            s = tile_scores(qt, k, start, b, h, position, step, sizes, rules, score, d, D, BN, True)
            kept, keys, worst, out = insert(s, start, j, place, kept, keys, worst, out)

    put_in_order(kept, keys, place, lse, mass, keys_at, row, exists, sizes.top, rules.key_offset)


def takes(rows: int, keys: int, d: int, count: int, dtype: torch.dtype) -> bool:
    """Whether a list of ``count`` keys is short beside the buckets, and there are rows to fill a tile.

    Two walks cost more than one that inserts rarely: on an H200 (16 keys of d 128) they take half the time at 2,048
    keys, and 1.2 and 1.6 times it at 16,384 and 65,536.
    """
    return rows >= 16 and keys <= MOST_KEYS and 2 * count <= tuning.top_tiles(padded(d), dtype).keys


def heaviest(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    count: int,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Masses and positions of the ``count`` heaviest keys, as ``topk.top_keys`` gives them."""
    batch, heads, n, d = q.shape
    tiles, room = tuning.top_tiles(padded(d), q.dtype), max(8, 2 << (count - 1).bit_length())
    found = torch.empty(batch, heads, n, room, dtype=torch.float32, device=q.device)
    keys = torch.empty(found.shape, dtype=torch.int32, device=q.device)
    mass = torch.empty(batch, heads, n, count, dtype=torch.float32, device=q.device)
    keys_at = torch.empty(mass.shape, dtype=torch.int64, device=q.device)
    if mass.numel() == 0:
        return mass, keys_at
    q, k, lse = last_dim_contiguous(q), last_dim_contiguous(k), lse.contiguous()
    rows = min(tiles.rows, max(16, 1 << (n - 1).bit_length()))
    launch(
        _kernel,
        (triton.cdiv(n, rows), batch * heads),
        q,
        q,
        k,
        lse,
        found,
        keys,
        mass,
        keys_at,
        (strides(q), strides(k)),
        Sizes(heads, heads // k.shape[1], n, k.shape[2], count),
        rules(mask, batch, positions),
        score(scale, softcap, bias),
        d=d,
        D=padded(d),
        ROOM=room,
        BM=rows,
        BN=tiles.keys,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return mass, keys_at
