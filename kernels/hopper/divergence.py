"""The distances of ``triton.divergence``, for Hopper (see ``hopper``).

Tiles of both patterns' keys come together, and both products are issued before either is waited for. Then every pair of
weights takes three exponentials or logarithms, whose unit bounds the kernel. With P the larger of p and r, e = 2^-t the
smaller one's share of it, and M = log2 P, log2 of their mean is M + log2(1 + e) - 1, and

    2 JS = sum P (1 + e) (1 - log2(1 + e)) - P e t,

in units of ln 2: no weight's logarithm is taken, and equal weights give exactly 0.

The queries of wide heads leave no room for keys in shared memory: they come by the same tiles, and stay in registers.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from headscope.kernels.hopper.device import (
    GROUP_ROWS,
    LOG2E,
    barriers,
    block_rows,
    bounds,
    buffers,
    fetch,
    fold,
    group_keys,
    group_rows,
    seen_in_tile,
    skip,
    taking_turns,
    tile_width,
    tiles,
    total,
)
from headscope.kernels.hopper.scores import logarithm, scored
from headscope.kernels.triton.device import LN2 as _LN2
from headscope.kernels.triton.device import launch

GROUPS = gl.constexpr(2)
LN2 = gl.constexpr(_LN2.value)


@gluon.jit
def _fetch(at, smem, bars, where, lo, hi, STAY: gl.constexpr):
    """The producer: the block's queries, then its tiles of keys, of both patterns each."""
    q_at, u_at, k_at, w_at = at
    q_smem, u_smem, k_smem, w_smem = smem
    q_ready, ready, free = bars
    b, h, kv, row = where
    BN: gl.constexpr = k_at.block_type.shape[2]
    STAGES: gl.constexpr = k_smem.shape[0]
    bytes_: gl.constexpr = q_at.block_type.nbytes + u_at.block_type.nbytes
    n = 0
    if STAY:
        mbarrier.expect(q_ready.index(0), GROUPS * bytes_)
        for group in gl.static_range(GROUPS):
            fetch(q_at, [b, h, row + group * GROUP_ROWS, 0], q_ready.index(0), q_smem.index(group))
            fetch(u_at, [b, h, row + group * GROUP_ROWS, 0], q_ready.index(0), u_smem.index(group))
    else:
        for group in gl.static_range(GROUPS):
            mbarrier.expect(ready.index(group), bytes_)
            fetch(q_at, [b, h, row + group * GROUP_ROWS, 0], ready.index(group), k_smem.index(group))
            fetch(u_at, [b, h, row + group * GROUP_ROWS, 0], ready.index(group), w_smem.index(group))
        n = GROUPS
    for start in range(lo, hi, BN):
        stage = n % STAGES
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(stage), k_at.block_type.nbytes + w_at.block_type.nbytes)
        fetch(k_at, [b, kv, start, 0], ready.index(stage), k_smem.index(stage))
        fetch(w_at, [b, kv, start, 0], ready.index(stage), w_smem.index(stage))
        n += 1


@gluon.jit
def _queries(group: gl.constexpr, smem, bars, mma: gl.constexpr, STAY: gl.constexpr):
    """A group's queries of both patterns, and how many tiles have passed."""
    q_smem, u_smem, k_smem, w_smem = smem
    q_ready, ready, free = bars
    D: gl.constexpr = k_smem.shape[4]
    if STAY:
        mbarrier.wait(q_ready.index(0), 0)
        return q_smem.index(group).reshape([GROUP_ROWS, D]), u_smem.index(group).reshape([GROUP_ROWS, D]), 0
    else:
        skip(0, group, ready, free, 1)
        mbarrier.wait(ready.index(group), 0)
        q = k_smem.index(group).reshape([GROUP_ROWS, D]).load(gl.DotOperandLayout(0, mma, 2))
        u = w_smem.index(group).reshape([GROUP_ROWS, D]).load(gl.DotOperandLayout(0, mma, 2))
        mbarrier.arrive(free.index(group))
        skip(group + 1, GROUPS - 1 - group, ready, free, 1)
        return q, u, GROUPS


@gluon.jit
def _add(log_p, log_r, sums, less, less_other, LOST: gl.constexpr):
    """``sums`` and what the weights of a tile (row, key) give them, from the logarithms of both sides' weights."""
    js, kl, apart, pr, pp, rr = sums
    if LOST:
        x, y = gl.exp2(log_p), gl.exp2(log_r)
        pr, pp, rr = pr + fold(x * y, True), pp + fold(x * x, True), rr + fold(y * y, True)
        log_p, log_r = log_p - less[:, None], log_r - less_other[:, None]
    gap = log_p - log_r
    t = gl.abs(gap)
    e = gl.exp2(-t)
    most = gl.exp2(gl.maximum(log_p, log_r))
    least = most * e
    js += fold((most + least) * (1.0 - logarithm(1.0 + e)) - least * t, True)
    x = gl.where(gap >= 0.0, most, least)
    kl += fold(x * gap, True)
    apart += fold(most - least, True)
    if not LOST:
        y = gl.where(gap >= 0.0, least, most)
        pr, pp, rr = pr + fold(most * least, True), pp + fold(x * x, True), rr + fold(y * y, True)
    return js, kl, apart, pr, pp, rr


@gluon.jit
def _norm(lse, row, exists):
    """Numbers of rows, in units of ln 2."""
    return gl.load(lse + row, mask=exists, other=0.0) * LOG2E


@gluon.jit
def _reduce(
    group: gl.constexpr,
    smem,
    bars,
    norms,
    out,
    count,
    sizes,
    rules,
    score,
    where,
    lo,
    hi,
    STAY: gl.constexpr,
):
    """One group: the distances of 64 rows."""
    _q_smem, _u_smem, k_smem, w_smem = smem
    _q_ready, ready, free = bars
    lse, lse_other, lost, lost_other = norms
    b, h, _kv, row = where
    BN: gl.constexpr = k_smem.shape[3]
    D: gl.constexpr = k_smem.shape[4]
    STAGES: gl.constexpr = k_smem.shape[0]
    LOST: gl.constexpr = lost is not None
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    first = row + group * GROUP_ROWS
    i, position = group_rows(first, sizes, rules, rows)
    mine, full_lo, full_hi, stop = group_keys(first, b, sizes, rules, lo, hi, BN)
    exists = i < sizes.rows
    at_row = (b.to(gl.int64) * sizes.heads + h) * sizes.rows + i
    norm, other = _norm(lse, at_row, exists), _norm(lse_other, at_row, exists)
    less, less_other = norm, other
    if LOST:
        less, less_other = _norm(lost, at_row, exists), _norm(lost_other, at_row, exists)
    j = gl.arange(0, BN, layout=gl.SliceLayout(0, mma))
    zero = gl.zeros([GROUP_ROWS, BN], gl.float32, mma)
    nothing = fold(zero, True)
    sums = (nothing, nothing, nothing, nothing, nothing, nothing)
    q, u, n = _queries(group, smem, bars, mma, STAY)
    n = skip(n, mine - lo, ready, free, BN)
    for part in gl.static_range(3):
        start, to = bounds(part, mine, full_lo, full_hi, stop)
        for at in range(start, to, BN):
            stage = n % STAGES
            mbarrier.wait(ready.index(stage), n // STAGES & 1)
            kt = k_smem.index(stage).reshape([BN, D]).permute([1, 0])
            wt = w_smem.index(stage).reshape([BN, D]).permute([1, 0])
            s_ = warpgroup_mma(q, kt, zero, use_acc=False, is_async=True)
            t_ = warpgroup_mma(u, wt, zero, use_acc=False, is_async=True)
            s, t = warpgroup_mma_wait(0, deps=[s_, t_])
            mbarrier.arrive(free.index(stage))
            s, unit = scored(s, score, 0.0)
            t, _unit = scored(t, score, 0.0)
            log_p, log_r = s * unit - norm[:, None], t * unit - other[:, None]
            if part != 1:
                seen = seen_in_tile(position, j, at, b, sizes, rules)
                log_p, log_r = gl.where(seen, log_p, -1e30), gl.where(seen, log_r, -1e30)
            sums = _add(log_p, log_r, sums, less, less_other, LOST)
            n += 1
    skip(n, hi - mine - gl.cdiv(stop - mine, BN) * BN, ready, free, BN)
    js, kl, apart, pr, pp, rr = sums
    size = gl.sqrt(total(pp, rows, True) * total(rr, rows, True))
    gl.store(out + at_row, gl.maximum(total(js, rows, True), 0.0) * (0.5 * LN2), mask=exists)
    gl.store(out + count + at_row, total(kl, rows, True) * LN2, mask=exists)
    gl.store(out + 2 * count + at_row, total(apart, rows, True) * 0.5, mask=exists)
    gl.store(out + 3 * count + at_row, total(pr, rows, True) / gl.where(size > 0.0, size, 1.0), mask=exists)


@gluon.jit
def _kernel(
    q_at,
    u_at,
    k_at,
    w_at,
    norms,
    out,
    count,
    sizes,
    rules,
    score,
    together,
    STAGES: gl.constexpr,
):
    BN: gl.constexpr = k_at.block_type.shape[2]
    STAY: gl.constexpr = q_at.block_type.shape[3] <= 128
    b, h, row, lo, hi = block_rows(together, GROUPS * GROUP_ROWS, sizes, rules, BN)
    where = (b, h, h // sizes.group, row)
    k_smem, w_smem = buffers(k_at, STAGES), buffers(w_at, STAGES)
    smem = (k_smem, w_smem, k_smem, w_smem)
    if STAY:
        smem = (buffers(q_at, GROUPS), buffers(u_at, GROUPS), k_smem, w_smem)
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, GROUPS))
    at = (q_at, u_at, k_at, w_at)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_reduce, (0, smem, bars, norms, out, count, sizes, rules, score, where, lo, hi, STAY)),
            (_reduce, (1, smem, bars, norms, out, count, sizes, rules, score, where, lo, hi, STAY)),
            (_fetch, (at, smem, bars, where, lo, hi, STAY)),
        ],
        [4, 1],
        [240, 24],
    )


def shape(width: int) -> tuple[int, int]:
    """Keys of a tile, as many as a group has rows, for queries may come by such tiles, and how many tiles wait, for
    tiles ``width`` wide (shared memory)."""
    return GROUP_ROWS.value, 4 if width <= 128 else 3


def distances(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    w: Tensor,
    norms: tuple[Tensor | None, ...],
    out: Tensor,
    sizes: Any,
    rules: Any,
    score: Any,
) -> None:
    """Fill ``out`` (4, batch, head, query): see ``triton.divergence.distances``."""
    width = tile_width(q.shape[3])
    keys, stages = shape(width)
    pairs = q.shape[0] * sizes.heads
    together = taking_turns(pairs, 2 * k[0, 0].nbytes // sizes.group)
    grid = (triton.cdiv(sizes.rows, GROUPS.value * GROUP_ROWS.value) * pairs,)
    at = (*(tiles(x, GROUP_ROWS.value, width) for x in (q, u)), *(tiles(x, keys, width) for x in (k, w)))
    launch(_kernel, grid, q, *at, norms, out, out[0].numel(), sizes, rules, score, together, STAGES=stages, num_warps=4)
