"""A ``Mask`` inside a Triton kernel: which keys a tile sees, and which tiles need not ask."""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.masks import Mask


class Rules(NamedTuple):
    """A ``Mask`` as a kernel argument; a rule that is None costs nothing (it is compiled away)."""

    query_offset: int
    key_offset: int
    left: int | None
    right: int | None
    start: Tensor | None
    end: Tensor | None
    chunk: int | None
    origin: Tensor | None
    segments: Tensor | None
    segment_stride: int
    segment_count: int
    positions: Tensor | None  # absolute positions of the query rows, where they are a subset


def rules(mask: Mask, batch: int, positions: Tensor | None = None) -> Rules:
    """``mask`` (without a ``rule``) for ``batch`` examples."""
    if mask.rule is not None:
        raise ValueError("Triton kernels evaluate no index rule; use the streaming engine")

    def per_example(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(batch).contiguous()

    segments = None if mask.segments is None else mask.segments.contiguous()
    stride = 0 if segments is None or segments.shape[0] == 1 else segments.shape[1]
    return Rules(
        mask.query_offset,
        mask.key_offset,
        mask.left,
        mask.right,
        per_example(mask.start),
        per_example(mask.end),
        mask.chunk,
        per_example(mask.origin) if mask.chunk is not None else None,
        segments,
        stride,
        0 if segments is None else segments.shape[1],
        positions,
    )


@triton.jit
def row_positions(index, rules):
    """Absolute positions of query rows ``index``."""
    if rules.positions is None:
        return index + rules.query_offset
    else:
        return tl.load(rules.positions + index).to(tl.int32)


@triton.jit
def visible(q, k, b, rules):
    """Which keys at positions ``k`` (n,) queries at ``q`` (m,) of example ``b`` see: (m, n)."""
    seen = (q[:, None] == q[:, None]) & (k[None, :] == k[None, :])
    if rules.right is not None:
        seen = seen & (k[None, :] <= q[:, None] + rules.right)
    if rules.left is not None:
        seen = seen & (k[None, :] >= q[:, None] - rules.left)
    if rules.start is not None:
        seen = seen & (k >= tl.load(rules.start + b).to(tl.int32))[None, :]
    if rules.end is not None:
        seen = seen & (k < tl.load(rules.end + b).to(tl.int32))[None, :]
    if rules.chunk is not None:
        seen = seen & (chunk_of(k, b, rules)[None, :] == chunk_of(q, b, rules)[:, None])
    if rules.segments is not None:
        seen = seen & (segment_of(k, b, rules)[None, :] == segment_of(q, b, rules)[:, None])
    return seen


@triton.jit
def chunk_of(x, b, rules):
    """The chunk of positions ``x``, rounding towards minus infinity as Python does."""
    if rules.origin is not None:
        x = x - tl.load(rules.origin + b).to(tl.int32)
    quotient = x // rules.chunk
    return tl.where((x - quotient * rules.chunk) < 0, quotient - 1, quotient)


@triton.jit
def segment_of(x, b, rules):
    """The segment of positions ``x``."""
    exists = (x >= 0) & (x < rules.segment_count)
    return tl.load(rules.segments + b.to(tl.int64) * rules.segment_stride + x, mask=exists, other=-1)


@triton.jit
def key_range(first, last, b, keys, rules, BN: tl.constexpr):
    """Key indices for queries at positions ``first..last``: (lo, hi, full_lo, full_hi).

    No key outside ``lo:hi`` is visible; every key of ``full_lo:full_hi`` is visible to every query, so its tiles need
    no mask. ``lo``, ``full_lo`` and ``full_hi`` are multiples of the tile ``BN``.
    """
    lo = 0
    hi = keys
    flo = 0
    fhi = keys
    if rules.right is not None:
        hi = tl.minimum(hi, last + rules.right - rules.key_offset + 1)
        fhi = tl.minimum(fhi, first + rules.right - rules.key_offset + 1)
    if rules.left is not None:
        lo = tl.maximum(lo, first - rules.left - rules.key_offset)
        flo = tl.maximum(flo, last - rules.left - rules.key_offset)
    if rules.start is not None:
        begin = tl.load(rules.start + b).to(tl.int32) - rules.key_offset
        lo = tl.maximum(lo, begin)
        flo = tl.maximum(flo, begin)
    if rules.end is not None:
        stop = tl.load(rules.end + b).to(tl.int32) - rules.key_offset
        hi = tl.minimum(hi, stop)
        fhi = tl.minimum(fhi, stop)
    if (rules.chunk is not None) or (rules.segments is not None):
        fhi = 0
    if rules.chunk is not None:
        begin = chunk_of(first, b, rules) * rules.chunk
        stop = (chunk_of(last, b, rules) + 1) * rules.chunk
        if rules.origin is not None:
            begin += tl.load(rules.origin + b).to(tl.int32)
            stop += tl.load(rules.origin + b).to(tl.int32)
        lo = tl.maximum(lo, begin - rules.key_offset)
        hi = tl.minimum(hi, stop - rules.key_offset)
    hi = tl.maximum(hi, 0)
    lo = tl.minimum(lo, hi) // BN * BN
    flo = (tl.minimum(flo, hi) + BN - 1) // BN * BN
    fhi = tl.minimum(tl.maximum(fhi, 0), hi) // BN * BN
    none = flo >= fhi
    return lo, hi, tl.where(none, lo, flo), tl.where(none, lo, fhi)


@triton.jit
def query_range(begin, size, b, first, stop, keys, rules, BM: tl.constexpr):
    """Query rows that see keys ``begin : begin + size``, as ``key_range`` of the rows ``first:stop``.

    The ranges are multiples of the tile ``BM`` away from ``first``. Rows are consecutive from the query offset.
    """
    near = begin + rules.key_offset - rules.query_offset
    far = near + size - 1
    lo = first
    hi = stop
    flo = first
    fhi = stop
    if rules.right is not None:
        lo = tl.maximum(lo, near - rules.right)
        flo = tl.maximum(flo, far - rules.right)
    if rules.left is not None:
        hi = tl.minimum(hi, far + rules.left + 1)
        fhi = tl.minimum(fhi, near + rules.left + 1)
    whole = begin + size <= keys
    if rules.start is not None:
        real = tl.load(rules.start + b).to(tl.int32) - rules.query_offset
        lo = tl.maximum(lo, real)
        whole = whole & (near >= real)
    if rules.end is not None:
        real = tl.load(rules.end + b).to(tl.int32) - rules.query_offset
        hi = tl.minimum(hi, real)
        whole = whole & (far < real)
    if (rules.chunk is not None) or (rules.segments is not None):
        whole = whole & (size < 0)
    hi = tl.maximum(hi, first)
    flo = tl.maximum(flo, lo)  # padding moves ``lo`` alone: whole tiles are counted from it
    lo = first + tl.maximum(tl.minimum(lo, hi) - first, 0) // BM * BM
    flo = first + tl.maximum(tl.minimum(flo, hi) - first + BM - 1, 0) // BM * BM
    fhi = first + tl.maximum(tl.minimum(fhi, hi) - first, 0) // BM * BM
    none = (flo >= fhi) | (whole == 0)
    return lo, hi, tl.where(none, lo, flo), tl.where(none, lo, fhi)
