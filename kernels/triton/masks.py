"""A ``Mask`` inside a Triton kernel: which keys a tile sees, and which tiles need not ask."""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.triton.features import kept


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
    segments: Tensor | None  # where a segment is not one run of positions; else its bounds say all
    begins: Tensor | None  # of each position's segment, or of one behind it: what it sees begins there at the earliest
    ends: Tensor | None
    segment_stride: int
    segment_count: int
    positions: Tensor | None  # absolute positions of the query rows, where they are a subset


def rules(
    mask: Mask, batch: int, positions: Tensor | None = None, ranges: tuple[Tensor, Tensor] | None = None
) -> Rules:
    """``mask`` (without a ``rule``) for ``batch`` examples; ``ranges`` as in ``passes.rows``."""
    if mask.rule is not None:
        raise ValueError("Triton kernels evaluate no index rule; use the streaming engine")

    def per_example(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(batch).contiguous()

    segments = mask.segments
    begins, ends, runs = (None, None, True) if segments is None else segment_bounds(segments)
    if ranges is not None:
        begins, ends = ranges
    length = 0 if begins is None else begins.shape[1]
    return Rules(
        mask.query_offset,
        mask.key_offset,
        mask.left,
        mask.right,
        per_example(mask.start),
        per_example(mask.end),
        mask.chunk,
        per_example(mask.origin) if mask.chunk is not None else None,
        None if segments is None or runs else segments.contiguous(),
        begins,
        ends,
        0 if begins is None or begins.shape[0] == 1 else length,
        length,
        positions,
    )


@kept
def segment_bounds(segments: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Of each position of ``segments`` (batch or 1, position), bounds of what lies in its segment, and whether each
    segment is one run.

    Begins and ends (batch or 1, position) int32 never fall from a position to the next, so that those of a block's
    first and last row bound what the block sees. Where segments are runs they are exact. While a CUDA graph is captured
    nobody can ask whether they are.
    """
    length = segments.shape[1]
    order = segments.argsort(dim=1, stable=True)
    ids = segments.gather(1, order)
    new = ids[:, 1:] != ids[:, :-1]
    at = torch.arange(length, device=segments.device).expand_as(order)
    low = torch.where(torch.nn.functional.pad(new, (1, 0), value=True), at, 0).cummax(1).values
    high = torch.where(torch.nn.functional.pad(new, (0, 1), value=True), at, length).flip(1).cummin(1).values.flip(1)
    first, last = order.gather(1, low), order.gather(1, high)
    captured = segments.is_cuda and torch.cuda.is_current_stream_capturing()
    runs = not captured and bool((last - first == high - low).all())
    begins, ends = (torch.zeros_like(order).scatter_(1, order, x) for x in (first, last + 1))
    begins = begins.flip(1).cummin(1).values.flip(1)
    return begins.to(torch.int32).contiguous(), ends.cummax(1).values.to(torch.int32).contiguous(), runs


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
    elif rules.begins is not None:
        seen = seen & (k[None, :] >= segment_bound(rules.begins, q, b, rules)[:, None])
        seen = seen & (k[None, :] < segment_bound(rules.ends, q, b, rules)[:, None])
    return seen


@triton.jit
def sees(q, k, b, rules):
    """Whether each query at positions ``q`` (n,) of example ``b`` sees the key at the same place of ``k`` (n,)."""
    seen = q == q
    if rules.right is not None:
        seen = seen & (k <= q + rules.right)
    if rules.left is not None:
        seen = seen & (k >= q - rules.left)
    if rules.start is not None:
        seen = seen & (k >= tl.load(rules.start + b).to(tl.int32))
    if rules.end is not None:
        seen = seen & (k < tl.load(rules.end + b).to(tl.int32))
    if rules.chunk is not None:
        seen = seen & (chunk_of(k, b, rules) == chunk_of(q, b, rules))
    if rules.segments is not None:
        seen = seen & (segment_of(k, b, rules) == segment_of(q, b, rules))
    elif rules.begins is not None:
        seen = seen & (k >= segment_bound(rules.begins, q, b, rules))
        seen = seen & (k < segment_bound(rules.ends, q, b, rules))
    return seen


@triton.jit
def chunk_of(x, b, rules):
    """The chunk of positions ``x``, rounding towards minus infinity as Python does."""
    if rules.origin is not None:
        x = x - tl.load(rules.origin + b).to(tl.int32)
    quotient = x // rules.chunk
    return tl.where((x - quotient * rules.chunk) < 0, quotient - 1, quotient)


@triton.jit
def chunk_begin(x, b, rules):
    """The first position of the chunk of positions ``x``."""
    begin = chunk_of(x, b, rules) * rules.chunk
    if rules.origin is not None:
        begin += tl.load(rules.origin + b).to(tl.int32)
    return begin


@triton.jit
def segment_bound(bound, x, b, rules):
    """``rules.begins`` or ``rules.ends`` of positions ``x``, or of the nearest that has one."""
    x = tl.minimum(tl.maximum(x, 0), rules.segment_count - 1)
    return tl.load(bound + b.to(tl.int64) * rules.segment_stride + x)


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
    if rules.chunk is not None:
        begin = chunk_begin(first, b, rules) - rules.key_offset
        stop = chunk_begin(last, b, rules) - rules.key_offset
        lo = tl.maximum(lo, begin)
        hi = tl.minimum(hi, stop + rules.chunk)
        flo = tl.maximum(flo, stop)
        fhi = tl.minimum(fhi, begin + rules.chunk)
    if rules.begins is not None:
        lo = tl.maximum(lo, segment_bound(rules.begins, first, b, rules) - rules.key_offset)
        hi = tl.minimum(hi, segment_bound(rules.ends, last, b, rules) - rules.key_offset)
        if rules.segments is not None:
            fhi = 0
        else:
            flo = tl.maximum(flo, segment_bound(rules.begins, last, b, rules) - rules.key_offset)
            fhi = tl.minimum(fhi, segment_bound(rules.ends, first, b, rules) - rules.key_offset)
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
    if rules.chunk is not None:
        begin = chunk_begin(near + rules.query_offset, b, rules) - rules.query_offset
        end = chunk_begin(far + rules.query_offset, b, rules) - rules.query_offset
        lo = tl.maximum(lo, begin)
        hi = tl.minimum(hi, end + rules.chunk)
        flo = tl.maximum(flo, end)
        fhi = tl.minimum(fhi, begin + rules.chunk)
    if rules.begins is not None:  # that two positions lie in one segment holds of both or neither
        near += rules.query_offset
        far += rules.query_offset
        lo = tl.maximum(lo, segment_bound(rules.begins, near, b, rules) - rules.query_offset)
        hi = tl.minimum(hi, segment_bound(rules.ends, far, b, rules) - rules.query_offset)
        if rules.segments is not None:
            whole = whole & (size < 0)
        else:
            flo = tl.maximum(flo, segment_bound(rules.begins, far, b, rules) - rules.query_offset)
            fhi = tl.minimum(fhi, segment_bound(rules.ends, near, b, rules) - rules.query_offset)
    hi = tl.maximum(hi, first)
    flo = tl.maximum(flo, lo)  # padding moves ``lo`` alone: whole tiles are counted from it
    lo = first + tl.maximum(tl.minimum(lo, hi) - first, 0) // BM * BM
    flo = first + tl.maximum(tl.minimum(flo, hi) - first + BM - 1, 0) // BM * BM
    fhi = first + tl.maximum(tl.minimum(fhi, hi) - first, 0) // BM * BM
    none = (flo >= fhi) | (whole == 0)
    return lo, hi, tl.where(none, lo, flo), tl.where(none, lo, fhi)
