"""The heaviest keys of every query, from the lse: no map, and a list of at most 32 keys a query.

1. A program holds a block of queries and, for each, the K best scores so far with their keys, in any order.
2. Over tiles of keys: while the largest score left in some row of the tile beats the worst on that row's list, it takes
   that place, and is struck from the tile. A tile with nothing new costs one maximum; over n keys in random order a
   list changes about K (1 + ln(n / K)) times.
3. Tiles are walked from the last key to the first: recent keys tend to be heavy, and lists that start full of heavy
   keys change seldom.
4. The list is sorted at the end, and p = exp(s - lse). For few queries (decoding) the keys are split over programs, and
   the best of all their lists are kept: an exact merge. Reading every key a second time after lse, at 131,072 keys by
   half the time of SDPA, is the least that they cost.
5. Many queries and lists that are short beside a tile go to ``heaviest``, which walks the keys twice instead; one query
   of many keys goes to ``few_lists``, which has their masses (``gpu_passes``).
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.triton import tuning as triton_tuning
from headscope.kernels.triton.device import (
    FLOOR,
    HIDDEN,
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
from headscope.kernels.triton.heaviest import heaviest, insert, put_in_order, takes
from headscope.kernels.triton.masks import key_range, row_positions, rules, visible

FEW_ROWS = 64  # up to this many queries of a key/value head share a program


class Sizes(NamedTuple):
    """The shape of a call of ``rows`` query rows; a program holds those of ``together`` heads."""

    heads: int
    group: int
    rows: int
    keys: int
    together: int


@triton.jit
def _kernel(
    q,
    k,
    best,
    best_keys,
    strides,
    sizes,
    rules,
    score,
    d: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    sets = sizes.heads // sizes.together
    b, h0 = tl.program_id(1) // sets, tl.program_id(1) % sets * sizes.together
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    r = begin + tl.arange(0, BM)
    exists = r < sizes.rows * sizes.together
    i, h = tl.where(exists, r % sizes.rows, 0), tl.where(exists, h0 + r // sizes.rows, h0)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    column = tl.arange(0, D)
    at = b64 * strides[0].batch + h64 * strides[0].head + i.to(tl.int64) * strides[0].position
    qt = tl.load(q + at[:, None] + column[None, :], mask=exists[:, None] & (column < d)[None, :], other=0.0)
    qt = signed(qt, score)
    k += b64 * strides[1].batch + (h0 // sizes.group).to(tl.int64) * strides[1].head
    position = row_positions(i, rules)
    first = row_positions(begin, rules)
    last = row_positions(tl.minimum(begin + BM, sizes.rows) - 1, rules)
    lo, hi, _, _ = key_range(first, last, b, sizes.keys, rules, BN)
    share = tl.cdiv(tl.cdiv(hi - lo, BN), tl.num_programs(2)) * BN
    lo = tl.minimum(lo + tl.program_id(2) * share, hi)
    hi = tl.minimum(hi, lo + share)

    j = tl.arange(0, BN)
    place = tl.arange(0, K)
    kept = tl.full([BM, K], FLOOR, tl.float32)
    keys = tl.full([BM, K], -1, tl.int32)
    worst, out = tl.min(kept, 1, return_indices=True)
    tiles = tl.cdiv(hi - lo, BN)
    for tile in range(0, tiles):
        start = lo + (tiles - 1 - tile) * BN
        base = k + start.to(tl.int64) * strides[1].position
        kt = load_rows(base, j, strides[1].position, sizes.keys - start, d, D, False)
        s = scored(tl.dot(qt, tl.trans(kt), input_precision=PARTS if D <= 128 else WHOLE), score)
        s = biased(s, score, b, h[:, None], (start + j)[None, :], sizes.keys)
        seen = visible(position, start + j + rules.key_offset, b, rules) & (start + j < hi)[None, :]
        s = tl.where(seen, s, HIDDEN)
        kept, keys, worst, out = insert(s, start, j, place, kept, keys, worst, out)

    batches = (tl.num_programs(1) // sets).to(tl.int64)
    row = ((tl.program_id(2) * batches + b64) * sizes.heads + h64) * sizes.rows + i
    at = row[:, None] * K + place[None, :]
    tl.store(best + at, kept, mask=exists[:, None])
    tl.store(best_keys + at, keys, mask=exists[:, None])


@triton.jit
def _merge_kernel(
    best, best_keys, lse, mass, keys_at, rows, top, key_offset, K: tl.constexpr, ALL: tl.constexpr, BM: tl.constexpr
):
    """The lists (split, row, K) of all splits as one, in order."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    exists = row < rows
    place = tl.arange(0, ALL)
    at = ((place // K).to(tl.int64)[None, :] * rows + row[:, None]) * K + (place % K)[None, :]
    kept = tl.load(best + at, mask=exists[:, None], other=FLOOR)
    keys = tl.load(best_keys + at, mask=exists[:, None], other=-1)
    put_in_order(kept, keys, place, lse, mass, keys_at, row, exists, top, key_offset)


def top_keys(
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
    """Masses (float32) and positions (int64) of the ``count`` heaviest keys, heaviest first: (batch, head, row, count).

    ``q`` (batch, head, row, d), ``k`` (batch, kv_head, key, d), ``lse`` (batch, head, row) as the row kernel gives it
    (a sink logit included); ``positions`` as there. Where a row sees fewer keys the mass is 0 and the position -1;
    which of equal scores is kept, and in which order, is not defined. Raises ValueError for a ``count`` outside 1 to
    ``tuning.MOST_TOP``.
    """
    if not 1 <= count <= triton_tuning.MOST_TOP:
        raise ValueError(f"the kernel keeps 1 to {triton_tuning.MOST_TOP} keys a query; got {count}")
    batch, heads, n, d = q.shape
    together = _together(n, heads // k.shape[1])
    if together == 1 and takes(n, k.shape[2], d, count, q.dtype):
        given: dict[str, Any] = {"mask": mask, "scale": scale, "softcap": softcap, "bias": bias}
        return heaviest(q, k, lse, count=count, positions=positions, **given)
    sizes = Sizes(heads, heads // k.shape[1], n, k.shape[2], together)
    sets, size = batch * heads // sizes.together, 1 << (count - 1).bit_length()
    bm, bn = _tile(sizes, d, q.dtype)
    blocks, warps, stages = triton.cdiv(n * sizes.together, bm), 4, 2
    if blocks == 1:
        _, bn, warps, stages, *_ = triton_tuning.few_top_tiles(padded(d), q.dtype)
    splits = triton_tuning.key_splits(sets, sizes.keys, bn) if blocks == 1 else 1
    best = torch.empty(splits, batch, heads, n, size, dtype=torch.float32, device=q.device)
    keys = torch.empty(best.shape, dtype=torch.int32, device=q.device)
    mass = torch.empty(batch, heads, n, count, dtype=torch.float32, device=q.device)
    keys_at = torch.empty(mass.shape, dtype=torch.int64, device=q.device)
    if batch == 0 or n == 0:
        return mass, keys_at
    q, k = last_dim_contiguous(q), last_dim_contiguous(k)
    launch(
        _kernel,
        (blocks, sets, splits),
        q,
        q,
        k,
        best,
        keys,
        (strides(q), strides(k)),
        sizes,
        rules(mask, batch, positions),
        score(scale, softcap, bias),
        d=d,
        D=padded(d),
        K=size,
        BM=bm,
        BN=bn,
        num_warps=warps,
        num_stages=stages,
    )
    rows, all_ = batch * heads * n, splits * size
    numbers, tile = (rows, count, mask.key_offset), {"K": size, "ALL": all_, "BM": max(1, 512 // all_)}
    grid = (triton.cdiv(rows, tile["BM"]),)
    launch(_merge_kernel, grid, q, best, keys, lse.contiguous(), mass, keys_at, *numbers, **tile, num_warps=4)
    return mass, keys_at


def _together(rows: int, group: int) -> int:
    """How many heads of a key/value head share a program: all of them where their queries are few."""
    return group if rows * group <= FEW_ROWS else 1


def _tile(sizes: Sizes, d: int, dtype: torch.dtype) -> tuple[int, int]:
    """Query rows and keys of a tile: one holds all rows of heads that share a program.

    Exact float32 products run outside the tensor cores, on small tiles.
    """
    exact = dtype == torch.float32
    most = (32 if d <= 128 else 16) if exact and sizes.together == 1 else FEW_ROWS
    rows = 1 << (sizes.rows * sizes.together - 1).bit_length()
    return min(most, max(16, rows)), 32 if exact else 64
