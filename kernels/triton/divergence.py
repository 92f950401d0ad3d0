"""Distances between two patterns per query, from both lses: see ``headscope.kernels.divergence`` for what they are.

1. Two products per tile give log p = s - lse and log r = u - lse', in units of ln 2.
2. log m = log2(p + r) - 1: two weights too small to be numbers add nothing, and any other sum has a logarithm.
3. Six sums per query: JS, KL, |p - r|, x y, x^2, y^2 with x and y the weights among the keys alone, for the squares of
   what sink logits leave may be too small. Nothing is rescaled, as both lses are known; a thread keeps the sums of its
   places of a tile to itself until the end.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.fallback import falls_back
from headscope.kernels.hopper import dispatch as hopper
from headscope.kernels.masks import Mask
from headscope.kernels.replay import again
from headscope.kernels.triton import tuning
from headscope.kernels.triton.device import (
    LN2,
    LOG2E,
    PARTS,
    WHOLE,
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

SMALLEST = tl.constexpr(2.0**-126)  # the smallest weight with all its bits


class Sizes(NamedTuple):
    """The shape of a call."""

    heads: int
    group: int
    rows: int
    keys: int


@triton.jit
def _kernel(
    q,
    k,
    u,
    w,
    lse,
    lse_other,
    lost,
    lost_other,
    out,
    strides,
    sizes,
    rules,
    score,
    d: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    b, h = tl.program_id(1) // sizes.heads, tl.program_id(1) % sizes.heads
    b64, h64, kv = b.to(tl.int64), h.to(tl.int64), (h // sizes.group).to(tl.int64)
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    row = begin + tl.arange(0, BM)
    exists = row < sizes.rows
    q += b64 * strides[0].batch + h64 * strides[0].head
    k += b64 * strides[1].batch + kv * strides[1].head
    u += b64 * strides[2].batch + h64 * strides[2].head
    w += b64 * strides[3].batch + kv * strides[3].head
    qt = signed(load_rows(q, row, strides[0].position, sizes.rows, d, D, False), score)
    ut = signed(load_rows(u, row, strides[2].position, sizes.rows, d, D, False), score)
    base = (b64 * sizes.heads + h64) * sizes.rows
    norm = tl.load(lse + base + row, mask=exists, other=0.0) * LOG2E
    other = tl.load(lse_other + base + row, mask=exists, other=0.0) * LOG2E
    if lost is not None:
        less = tl.load(lost + base + row, mask=exists, other=0.0) * LOG2E
        less_other = tl.load(lost_other + base + row, mask=exists, other=0.0) * LOG2E
        share, share_other = tl.exp2(-less), tl.exp2(-less_other)
    position = row + rules.query_offset
    last = tl.minimum(begin + BM, sizes.rows) - 1 + rules.query_offset
    lo, hi, full_lo, full_hi = key_range(begin + rules.query_offset, last, b, sizes.keys, rules, BN)
    js = tl.zeros([BM, BN], tl.float32)
    kl = tl.zeros([BM, BN], tl.float32)
    apart = tl.zeros([BM, BN], tl.float32)
    pr = tl.zeros([BM, BN], tl.float32)
    pp = tl.zeros([BM, BN], tl.float32)
    rr = tl.zeros([BM, BN], tl.float32)
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
            step = start.to(tl.int64)
            j = tl.arange(0, BN)
            left = sizes.keys - start
            kt = load_rows(k + step * strides[1].position, j, strides[1].position, left, d, D, masked == 0)
            wt = load_rows(w + step * strides[3].position, j, strides[3].position, left, d, D, masked == 0)
            s = tl.dot(qt, tl.trans(kt), input_precision=PARTS if D <= 128 else WHOLE)
            t = tl.dot(ut, tl.trans(wt), input_precision=PARTS if D <= 128 else WHOLE)
            log_p = scored(s, score) - norm[:, None]
            log_r = scored(t, score) - other[:, None]
            if masked:
                seen = visible(position, start + j + rules.key_offset, b, rules) & (j < left)[None, :]
                log_p = tl.where(seen, log_p, -1e30)
                log_r = tl.where(seen, log_r, -1e30)
            x, y = tl.exp2(log_p), tl.exp2(log_r)
            pr += x * y
            pp += x * x
            rr += y * y
            if lost is not None:
                log_p, log_r = log_p - less[:, None], log_r - less_other[:, None]
                x, y = x * share[:, None], y * share_other[:, None]
            log_m = tl.log2(tl.maximum(x + y, SMALLEST)) - 1.0
            js += x * (log_p - log_m) + y * (log_r - log_m)
            kl += x * (log_p - log_r)
            apart += tl.abs(x - y)
    count = (tl.num_programs(1)).to(tl.int64) * sizes.rows
    size = tl.sqrt(tl.sum(pp, 1) * tl.sum(rr, 1))
    at = out + base + row
    tl.store(at, tl.maximum(tl.sum(js, 1), 0.0) * (0.5 * LN2), mask=exists)
    tl.store(at + count, tl.sum(kl, 1) * LN2, mask=exists)
    tl.store(at + 2 * count, tl.sum(apart, 1) * 0.5, mask=exists)
    tl.store(at + 3 * count, tl.sum(pr, 1) / tl.where(size > 0.0, size, 1.0), mask=exists)


def distances(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    lses: Sequence[Tensor],
    lost: Sequence[Tensor] | None,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Jensen-Shannon, KL, total variation and cosine of two (q, k) pairs of equal shapes: (4, batch, head, query).

    ``lses`` are of the keys alone, and ``lost`` is by how much sink logits raise them, if there are any; (batch, head,
    query) each.
    """
    (q, k), (u, w) = first, second
    norms = (*lses, *(lost or (None, None)))

    def run() -> tuple[Tensor]:
        return (_distances(first, second, norms, mask=mask, scale=scale, softcap=softcap),)

    # runs or heads that are compared often share their queries, or their keys
    tensors = (q, k, None if u is q else u, None if w is k else w, *norms, *mask.tensors)
    (out,) = again(run, tensors, ("divergence", scale, softcap, *mask.numbers))
    assert out is not None
    return out


def _distances(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, ...],
    *,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """``distances``; ``norms`` are ``lses`` and what ``lost`` holds."""
    q, k, u, w = (last_dim_contiguous(x) for x in (*first, *second))
    batch, heads, queries, d = q.shape
    out = torch.empty(4, batch, heads, queries, dtype=torch.float32, device=q.device)
    if batch == 0 or queries == 0:
        return out
    sizes, given = Sizes(heads, heads // k.shape[1], queries, k.shape[2]), score(scale, softcap, None)
    norms = tuple([None if x is None else x.contiguous() for x in norms])
    seen = rules(mask, batch)
    if all(hopper.takes(x, y, None, mask=mask, scale=scale, kernel="divergence") for x, y in ((q, k), (u, w))):
        with falls_back("Triton's own kernel"):
            hopper.fill_distances(q, k, u, w, norms, out, sizes, seen, given)
            return out
    tiles = tuning.divergence_tiles(padded(d), q.dtype)
    launch(
        _kernel,
        (triton.cdiv(queries, tiles.rows), batch * heads),
        q,
        q,
        k,
        u,
        w,
        *norms,
        out,
        tuple(strides(x) for x in (q, k, u, w)),
        sizes,
        seen,
        given,
        d=d,
        D=padded(d),
        BM=tiles.rows,
        BN=tiles.keys,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out
