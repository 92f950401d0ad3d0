"""Merge row results over disjoint sets of keys, each normalised over its own: how decoding splits keys over programs.

1. lse = log sum exp of the parts' lse (and of a sink logit, which is a part without a value);
2. with w = exp(lse_part - lse), every sum over keys is the sum of the parts' weighted by w;
3. the entropy is sum w (H_part + lse - lse_part): all terms are positive, so nothing cancels.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    parts,
    merged,
    sinks,
    count,
    splits,
    sizes,
    dv: tl.constexpr,
    DV: tl.constexpr,
    NF: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program merges one row of ``parts`` (split, row, ·), at most ``SPLITS``, into ``merged`` (row, ·)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    at = tl.minimum(split, splits - 1).to(tl.int64) * count + row  # what is no split reads the last, and weighs nothing
    lse = tl.load(parts.lse + at, mask=split < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    whole = top + tl.log(tl.where(some, tl.sum(tl.exp(lse - top), 0), 1.0))
    if sinks is not None:
        z = tl.load(sinks + (row // sizes.rows) % sizes.heads).to(tl.float32)
        top = tl.maximum(whole, z)
        whole = top + tl.log(tl.exp(whole - top) + tl.exp(z - top))
    live = lse > float("-inf")
    behind = tl.where(live, whole - lse, 0.0)
    w = tl.where(live, tl.exp(-behind), 0.0)
    if merged.lse is not None:
        tl.store(merged.lse + row, tl.where(some, whole, float("-inf")))
    if merged.max is not None:
        tl.store(merged.max + row, tl.max(tl.load(parts.max + at), 0))
    if merged.entropy is not None:
        tl.store(merged.entropy + row, tl.sum(w * (tl.load(parts.entropy + at) + behind), 0))
    if merged.distance is not None:
        tl.store(merged.distance + row, tl.sum(w * tl.load(parts.distance + at), 0))
    if merged.linear is not None:
        n = tl.arange(0, NF)
        kept = n < sizes.width
        x = tl.load(parts.linear + at[:, None] * sizes.width + n[None, :], mask=kept[None, :], other=0.0)
        tl.store(merged.linear + row * sizes.width + n, tl.sum(w[:, None] * x, 0), mask=kept)
    if merged.output is not None:
        c = tl.arange(0, DV)
        x = tl.load(parts.output + at[:, None] * dv + c[None, :], mask=(c < dv)[None, :], other=0.0)
        x = tl.sum(w[:, None] * x, 0)
        if merged.within is not None:
            x *= tl.where(some, tl.exp(whole - tl.load(merged.within + row)), 0.0)
        tl.store(merged.output + row * dv + c, x.to(merged.output.dtype.element_ty), mask=c < dv)
