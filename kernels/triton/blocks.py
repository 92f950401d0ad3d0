"""The pattern pooled to blocks, from the lse: see ``headscope.kernels.blocks`` for what it means.

1. One program owns a strip of queries of one head and walks the keys it sees in strips of the same width, so that each
   entry of the map is written once, by one program, without atomics.
2. A strip is a tile of several blocks, whose weights are summed by a reshape to (block, block, pair), or one block that
   is wider than a tile: the sum of its tiles.
3. Tiles that every query of the strip sees whole skip the mask.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.replay import again
from headscope.kernels.triton import tuning
from headscope.kernels.triton.device import (
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
def _norms(lse, row, b, sizes, rules):
    """The lse of rows in units of ln 2; +inf for those that give nothing."""
    norm = tl.load(lse + row, mask=row < sizes.queries, other=float("inf"))
    norm = tl.where(norm == float("-inf"), float("inf"), norm * LOG2E)
    position = row + rules.query_offset
    if rules.start is not None:
        norm = tl.where(position >= tl.load(rules.start + b).to(tl.int32), norm, float("inf"))
    if rules.end is not None:
        norm = tl.where(position < tl.load(rules.end + b).to(tl.int32), norm, float("inf"))
    return norm


@triton.jit
def _weights(qt, kt, norm, row, key, b, h, sizes, rules, score, D: tl.constexpr, MASKED: tl.constexpr):
    """The weights of a tile (row, key)."""
    s = scored(tl.dot(qt, tl.trans(kt), input_precision=PARTS if D <= 128 else WHOLE), score)
    s = biased(s, score, b, h, key[None, :], sizes.keys)
    if MASKED:
        seen = visible(row + rules.query_offset, key + rules.key_offset, b, rules) & (key < sizes.keys)[None, :]
        s = tl.where(seen, s, HIDDEN)
    return tl.exp2(s - norm[:, None])


@triton.jit
def _pool(p, BLOCKS: tl.constexpr, MAX: tl.constexpr):
    """A tile's weights pooled to (block, block)."""
    SIZE: tl.constexpr = p.shape[0] // BLOCKS
    p = tl.permute(tl.reshape(p, [BLOCKS, SIZE, BLOCKS, SIZE]), (0, 2, 1, 3))
    p = tl.reshape(p, [BLOCKS, BLOCKS, SIZE * SIZE])
    return tl.max(p, 2) if MAX else tl.sum(p, 2)


@triton.jit
def _keep(out, total, begin, start, sizes, SIZE: tl.constexpr):
    """Store blocks of the queries from ``begin`` and the keys from ``start``."""
    at = tl.arange(0, total.shape[0])
    i, j = begin // SIZE + at, start // SIZE + at
    whole = (i < sizes.down)[:, None] & (j < sizes.across)[None, :]
    tl.store(out + i.to(tl.int64)[:, None] * sizes.across + j[None, :], total, mask=whole)


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
    lo, hi, full_lo, full_hi = key_range(first, last, b, sizes.keys, rules, STRIP)
    if STRIP == TILE:
        row = begin + tl.arange(0, TILE)
        qt = signed(load_rows(q, row, strides[0].position, sizes.queries, d, D, False), score)
        norm = _norms(lse, row, b, sizes, rules)
        for masked in tl.static_range(0, 2):
            if masked:
                before = (full_lo - lo) // TILE
                tiles = before + tl.cdiv(hi - full_hi, TILE)
            else:
                before = 0
                tiles = (full_hi - full_lo) // TILE
            for tile in range(0, tiles):
                if masked:
                    start = tl.where(tile < before, lo + tile * TILE, full_hi + (tile - before) * TILE)
                else:
                    start = full_lo + tile * TILE
                j = tl.arange(0, TILE)
                base = k + start.to(tl.int64) * strides[1].position
                kt = load_rows(base, j, strides[1].position, sizes.keys - start, d, D, masked == 0)
                p = _weights(qt, kt, norm, row, start + j, b, h, sizes, rules, score, D, masked == 1)
                _keep(out, _pool(p, BLOCKS, MAX), begin, start, sizes, SIZE)
    else:
        for strip in range(lo // STRIP, tl.cdiv(hi, STRIP)):
            total = tl.zeros([1, 1], tl.float32)
            for tile in range((STRIP // TILE) * (STRIP // TILE)):
                row = begin + tile // (STRIP // TILE) * TILE + tl.arange(0, TILE)
                key = strip * STRIP + tile % (STRIP // TILE) * TILE + tl.arange(0, TILE)
                qt = signed(load_rows(q, row, strides[0].position, sizes.queries, d, D, False), score)
                kt = load_rows(k, key, strides[1].position, sizes.keys, d, D, False)
                norm = _norms(lse, row, b, sizes, rules)
                part = _pool(_weights(qt, kt, norm, row, key, b, h, sizes, rules, score, D, True), 1, MAX)
                total = tl.maximum(total, part) if MAX else total + part
            _keep(out, total, begin, strip * STRIP, sizes, SIZE)


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

    def run() -> tuple[Tensor]:
        return (_pooled(q, k, lse, mask=mask, scale=scale, softcap=softcap, bias=bias, size=size, highest=highest),)

    tensors, about = (q, k, lse, bias, *mask.tensors), ("blocks", size, highest, scale, softcap, *mask.numbers)
    (out,) = again(run, tensors, about)
    assert out is not None
    return out


def _pooled(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    size: int,
    highest: bool,
) -> Tensor:
    batch, heads, queries, d = q.shape
    tiles = tuning.block_tiles(padded(d), q.dtype)
    tile, keys, strip = tiles.rows, k.shape[2], max(size, tiles.rows)
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
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out
