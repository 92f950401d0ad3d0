"""The pattern pooled to blocks, from the lse: see ``headscope.kernels.blocks`` for what it means.

1. One program owns a strip of queries of one head and walks the keys it sees in strips of the same width, so that each
   entry of the map is written once, by one program, without atomics.
2. A strip is a block, or several where blocks are narrower than a tile: its weights are then summed by a
   reshape to (block, query, block, key).
3. A block wider than a tile is the sum of its tiles.
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
from headscope.kernels.triton.device import (
    HIDDEN,
    LOG2E,
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
from headscope.kernels.triton.masks import key_range, rules, visible


class Sizes(NamedTuple):
    """The shape of a call."""

    heads: int
    group: int
    queries: int
    keys: int
    down: int
    across: int


@triton.jit
def _kernel(
    q,
    k,
    lse,
    out,
    strides,
    sizes,
    rules,
    score,
    d: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    SIZE: tl.constexpr,
    STRIP: tl.constexpr,
    MAX: tl.constexpr,
):
    b, h = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    begin = tl.program_id(0) * STRIP
    q += b64 * strides[0].batch + h64 * strides[0].head
    k += b64 * strides[1].batch + (h // sizes.group).to(tl.int64) * strides[1].head
    lse += (b64 * sizes.heads + h64) * sizes.queries
    out += (b64 * sizes.heads + h64) * sizes.down * sizes.across
    BLOCKS: tl.constexpr = TILE // SIZE if SIZE < TILE else 1
    first = begin + rules.query_offset
    last = tl.minimum(begin + STRIP, sizes.queries) - 1 + rules.query_offset
    lo, hi, _, _ = key_range(first, last, b, sizes.keys, rules, STRIP)
    for strip in range(lo // STRIP, tl.cdiv(hi, STRIP)):
        total = tl.zeros([BLOCKS, BLOCKS], tl.float32)
        for tile in range((STRIP // TILE) * (STRIP // TILE)):
            row = begin + tile // (STRIP // TILE) * TILE + tl.arange(0, TILE)
            key = strip * STRIP + tile % (STRIP // TILE) * TILE + tl.arange(0, TILE)
            qt = signed(load_rows(q, row, strides[0].position, sizes.queries, d, D, False), score)
            kt = load_rows(k, key, strides[1].position, sizes.keys, d, D, False)
            norm = tl.load(lse + row, mask=row < sizes.queries, other=float("inf"))
            norm = tl.where(norm == float("-inf"), float("inf"), norm * LOG2E)
            position = row + rules.query_offset
            if rules.start is not None:
                norm = tl.where(position >= tl.load(rules.start + b).to(tl.int32), norm, float("inf"))
            if rules.end is not None:
                norm = tl.where(position < tl.load(rules.end + b).to(tl.int32), norm, float("inf"))
            s = scored(tl.dot(qt, tl.trans(kt), input_precision="ieee"), score)
            s = biased(s, score, b, h, key[None, :], sizes.keys)
            seen = visible(position, key + rules.key_offset, b, rules) & (key < sizes.keys)[None, :]
            p = tl.exp2(tl.where(seen, s, HIDDEN) - norm[:, None])
            p = tl.reshape(p, [BLOCKS, TILE // BLOCKS, BLOCKS, TILE // BLOCKS])
            if MAX:
                total = tl.maximum(total, tl.max(tl.max(p, 3), 1))
            else:
                total += tl.sum(tl.sum(p, 3), 1)
        at = tl.arange(0, BLOCKS)
        i, j = begin // SIZE + at, strip * (STRIP // SIZE) + at
        whole = (i < sizes.down)[:, None] & (j < sizes.across)[None, :]
        tl.store(out + i.to(tl.int64)[:, None] * sizes.across + j[None, :], total, mask=whole)


def pooled(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    size: int,
    highest: bool = False,
) -> Tensor:
    """Sums (or maxima) of ``size`` x ``size`` blocks of the pattern: (batch, head, query block, key block) float32.

    ``q`` (batch, head, query, d), ``k`` (batch, kv_head, key, d), ``lse`` (batch, head, query). Raises ValueError for a
    ``size`` that is no power of two of at least 16.
    """
    if size < 16 or size & (size - 1):
        raise ValueError(f"block sizes are powers of two from 16; got {size}")
    batch, heads, queries, d = q.shape
    tile = 32 if q.dtype == torch.float32 and size <= 32 else 64
    keys, strip = k.shape[2], max(size, tile)
    down, across = triton.cdiv(queries, size), triton.cdiv(keys, size)
    out = lse.new_zeros(batch, heads, down, across)  # blocks that no query sees are never visited
    if out.numel() == 0:
        return out
    q, k, lse = last_dim_contiguous(q), last_dim_contiguous(k), lse.contiguous()
    launch(
        _kernel,
        (triton.cdiv(queries, strip), batch * heads),
        q,
        q,
        k,
        lse,
        out,
        (strides(q), strides(k)),
        Sizes(heads, heads // k.shape[1], queries, keys, down, across),
        rules(mask, batch),
        score(scale, softcap, bias),
        d=d,
        D=padded(d),
        TILE=tile,
        SIZE=size,
        STRIP=strip,
        MAX=highest,
        num_warps=4,
        num_stages=2,
    )
    return out
