"""Sums of outputs over parts of the keys, each times its share: what a part wrote, or what all wrote together.

One program holds a block of rows; the sums are kept in float32, and each row is read and written once.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.triton.device import launch, padded

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
