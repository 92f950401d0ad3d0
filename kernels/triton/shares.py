"""Outputs over parts of the keys, each times its share: what every part wrote, or what all wrote together.

One program holds a block of rows; sums are kept in float32, and each row is read and written once, or, where it sees no
key of a part, never.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.triton.device import LOG2E, launch, padded

ROWS = 32


@triton.jit
def _kernel(parts, shares, out, count, d: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr, BM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, D)
    exists = row < count
    whole = exists[:, None] & (column < d)[None, :]
    at = row[:, None] * d + column[None, :]
    total = tl.zeros([BM, D], tl.float32)
    for n in tl.static_range(COUNT):
        share = tl.load(shares[n] + row, mask=exists, other=0.0).to(tl.float32)
        total += tl.load(parts[n] + at, mask=whole, other=0.0).to(tl.float32) * share[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=whole)


def add_shares(parts: Sequence[Tensor], shares: Sequence[Tensor], out: Tensor) -> None:
    """``out`` = sum of ``parts`` (..., d) times ``shares`` (...), all contiguous; ``out`` may be one of ``parts``."""
    if out.numel() == 0:
        return
    d, count = out.shape[-1], out.numel() // out.shape[-1]
    each = tuple(x.contiguous() for x in parts), tuple(x.contiguous() for x in shares)
    grid = (triton.cdiv(count, ROWS),)
    launch(_kernel, grid, out, *each, out, count, d=d, D=padded(d), COUNT=len(parts), BM=ROWS, num_warps=4)


@triton.jit
def _split_kernel(
    own,
    whole,
    sinks,
    mass,
    out,
    heads,
    rows,
    parts,
    d: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
):
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = i < rows
    first = (b.to(tl.int64) * parts * heads + h) * rows + i  # of the first part; the next is ``heads * rows`` further
    step = (b * 0 + heads).to(tl.int64) * rows
    if whole is not None:
        total = tl.load(whole + (b.to(tl.int64) * heads + h) * rows + i, mask=exists, other=0.0)
        total = tl.where(total == float("-inf"), 0.0, total)
    else:
        most = tl.full([BM], float("-inf"), tl.float32)
        for n in range(0, parts):
            most = tl.maximum(most, tl.load(own + first + n * step, mask=exists, other=0.0))
        if sinks is not None:
            most = tl.maximum(most, tl.load(sinks + h).to(tl.float32))
        most = tl.where(most == float("-inf"), 0.0, most)
        share = tl.zeros([BM], tl.float32)
        for n in range(0, parts):
            share += tl.exp2((tl.load(own + first + n * step, mask=exists, other=0.0) - most) * LOG2E)
        if sinks is not None:
            share += tl.exp2((tl.load(sinks + h).to(tl.float32) - most) * LOG2E)
        total = most
        share = 1.0 / tl.where(share > 0.0, share, 1.0)
    column = tl.arange(0, D)
    for n in range(0, parts):
        lse = tl.load(own + first + n * step, mask=exists, other=float("-inf"))
        some = lse > float("-inf")
        p = tl.where(some, tl.exp2((lse - total) * LOG2E), 0.0)
        if whole is None:
            p *= share
            at = out + (first + n * step)[:, None] * d + column[None, :]
            seen = some[:, None] & (column < d)[None, :]
            x = tl.load(at, mask=seen, other=0.0).to(tl.float32) * p[:, None]
            tl.store(at, x.to(out.dtype.element_ty), mask=seen)
        tl.store(mass + first + n * step, p, mask=exists)


def split_shares(own: Tensor, whole: Tensor | None, sinks: Tensor | None, out: Tensor) -> Tensor:
    """The mass of every part, (batch, part, head, row) as its lse ``own``, contiguous float32.

    ``whole`` (batch, head, row): the lse of all keys. Where it is None the parts are all keys beside ``sinks`` (head,),
    and ``out`` (batch, part, head, row, d), contiguous, is multiplied by the masses.
    """
    mass = torch.empty_like(own)
    batch, parts, heads, rows = own.shape
    if own.numel() == 0:
        return mass
    d = out.shape[-1]
    sinks = None if sinks is None else sinks.contiguous()
    grid, given = (triton.cdiv(rows, ROWS), batch * heads), (own, whole, sinks, mass, out, heads, rows, parts)
    launch(_split_kernel, grid, out, *given, d=d, D=padded(d), BM=ROWS, num_warps=4)
    return mass
