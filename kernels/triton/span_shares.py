"""What every span holds of a row: its mass, and its output scaled by it, from the lse and the output of each span.

A program holds rows of one span. It reads the lse of all of them, for their sum where no one knows it.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.triton.device import FLOOR, LOG2E, launch, padded

ROWS = 32


@triton.jit
def _kernel(own, total, sinks, mass, out, rows, heads, spans, d: tl.constexpr, D: tl.constexpr, BM: tl.constexpr):
    """``own``, ``mass`` (batch, span, head, row), ``out`` (batch, span, head, row, d), ``total`` (batch, head, row)."""
    b, span, h = tl.program_id(2), tl.program_id(1) // heads, tl.program_id(1) % heads
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = row < rows
    base = b.to(tl.int64) * spans * heads + h
    at = (base + span.to(tl.int64) * heads) * rows + row
    lse = tl.load(own + at, mask=exists, other=float("-inf"))
    if total is not None:
        whole = tl.load(total + (b.to(tl.int64) * heads + h) * rows + row, mask=exists, other=0.0)
    else:
        most, norm = tl.zeros([BM], tl.float32) + FLOOR, tl.zeros([BM], tl.float32)
        if sinks is not None:
            most, norm = most * 0.0 + tl.load(sinks + h).to(tl.float32), norm + 1.0
        for n in range(0, spans):
            one = tl.load(own + (base + n * heads) * rows + row, mask=exists, other=float("-inf"))
            new = tl.maximum(most, one)
            norm = norm * tl.exp2((most - new) * LOG2E) + tl.exp2((one - new) * LOG2E)
            most = new
        whole = most + tl.log2(tl.maximum(norm, 1e-30)) / LOG2E  # of a row that sees no key it is 0
    share = tl.where(lse == float("-inf"), 0.0, tl.exp2((lse - whole) * LOG2E))
    tl.store(mass + at, share, mask=exists)
    if out is not None:
        column = tl.arange(0, D)
        here = exists[:, None] & (column < d)[None, :]
        place = out + at[:, None] * d + column[None, :]
        x = tl.load(place, mask=here, other=0.0).to(tl.float32)
        tl.store(place, (x * share[:, None]).to(out.dtype.element_ty), mask=here)


def span_shares(own: Tensor, output: Tensor, total: Tensor | None, sinks: Tensor | None, spans: int) -> Tensor:
    """The mass of each span (batch * span, head, row), float32, from its lse ``own`` of the same shape.

    With ``total`` (batch, head, row), the lse of all keys, a sink logit included, ``output`` (batch * span, head, row,
    d) is each span's share already; without it the spans cut up all keys, and ``output`` is scaled in its place.
    """
    (_, heads, rows), d = own.shape, output.shape[3]
    mass = torch.empty(own.shape, dtype=torch.float32, device=own.device)
    out, sinks = (output, sinks) if total is None else (None, None)
    grid = (triton.cdiv(rows, ROWS), spans * heads, own.shape[0] // spans)
    options = {"d": d, "D": padded(d), "BM": ROWS, "num_warps": 4}
    launch(_kernel, grid, own, own, total, sinks, mass, out, rows, heads, spans, **options)
    return mass
