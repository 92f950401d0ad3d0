"""Row statistics and the attention output in one pass, for Hopper (see ``hopper``).

A block is 128 queries of one head, 64 a group. As in FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608, 3.2), the
product of the last tile's weights with its values runs beneath this tile's exponentials:

1. issue S = q k_n^T, then O += p_{n-1} v_{n-1};
2. wait for S alone; p_n and the statistics (steps 1 to 4 of ``triton_rows``);
3. wait for O, and scale it to the new maximum.
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

from headscope.kernels.hopper_device import (
    FLOOR,
    GROUP_ROWS,
    absorb,
    barriers,
    bounds,
    buffers,
    fetch,
    finish,
    fold,
    full_tiles,
    key_range,
    row_positions,
    store_rows,
    tiles,
    used_tiles,
)
from headscope.kernels.triton_device import on_device

GROUPS = gl.constexpr(2)


@gluon.jit
def _fetch(at, smem, bars, where, lo, hi, STAGES: gl.constexpr, FEATURES: gl.constexpr):
    """The producer: the block's queries, then tiles of keys and of values, the latter with the features' rows."""
    q_at, k_at, v_at, f_at = at
    q_smem, k_smem, v_smem, f_smem = smem
    q_ready, k_ready, k_free, v_ready, v_free = bars
    b, h, kv, fb, row = where
    BN: gl.constexpr = k_at.block_type.shape[2]
    mbarrier.expect(q_ready.index(0), GROUPS * q_at.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        fetch(q_at, [b, h, row + group * GROUP_ROWS, 0], q_ready.index(0), q_smem.index(group))
    n = 0
    for start in range(lo, hi, BN):
        stage = n % STAGES
        phase = (n // STAGES & 1) ^ 1
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_ready.index(stage), k_at.block_type.nbytes)
        fetch(k_at, [b, kv, start, 0], k_ready.index(stage), k_smem.index(stage))
        mbarrier.wait(v_free.index(stage), phase)
        if FEATURES:
            mbarrier.expect(v_ready.index(stage), v_at.block_type.nbytes + f_at.block_type.nbytes)
            fetch(f_at, [fb, start, 0], v_ready.index(stage), f_smem.index(stage))
        else:
            mbarrier.expect(v_ready.index(stage), v_at.block_type.nbytes)
        fetch(v_at, [b, kv, start, 0], v_ready.index(stage), v_smem.index(stage))
        n += 1


@gluon.jit
def _weigh(p, f, linear):
    """``linear`` and what the weights ``p`` give it of a tile of features."""
    f = f.reshape([f.shape[1], f.shape[2]])
    return warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, linear.type.layout, 2)), f, linear)


@gluon.jit
def _reduce(
    group: gl.constexpr,
    smem,
    bars,
    results,
    sizes,
    rules,
    sinks,
    scale,
    where,
    lo,
    hi,
    used,
    STAGES: gl.constexpr,
    FEATURES: gl.constexpr,
):
    """One group: the statistics and the output of 64 rows."""
    q_smem, k_smem, v_smem, f_smem = smem
    q_ready, k_ready, k_free, v_ready, v_free = bars
    b, h, kv, fb, row = where
    BN: gl.constexpr = k_smem.shape[3]
    D: gl.constexpr = k_smem.shape[4]
    DV: gl.constexpr = v_smem.shape[4]
    NF: gl.constexpr = f_smem.shape[3] if FEATURES else 16
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NF, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    weights: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    first = row + group * GROUP_ROWS
    i = first + gl.arange(0, GROUP_ROWS, layout=rows)
    position = row_positions(gl.where(i < sizes.rows, i, 0), rules)
    begin = row_positions(gl.minimum(first, sizes.rows - 1), rules)
    end = row_positions(gl.minimum(first + GROUP_ROWS - 1, sizes.rows - 1), rules)
    full_lo, full_hi = full_tiles(begin, end, b, sizes.keys, rules, lo, hi, BN)
    zero = gl.zeros([GROUP_ROWS, BN], gl.float32, mma)
    nothing = fold(zero, False)
    state = (gl.full([GROUP_ROWS], FLOOR, gl.float32, rows), nothing, nothing, nothing)
    p = gl.zeros([GROUP_ROWS, BN], q_smem.dtype, weights)  # weights of the tile before: none yet
    output = gl.zeros([GROUP_ROWS, DV], gl.float32, wide)
    linear = gl.zeros([GROUP_ROWS, NF], gl.float32, narrow)
    mbarrier.wait(q_ready.index(0), 0)
    q = q_smem.index(group).reshape([GROUP_ROWS, D])
    n = 0
    for part in gl.static_range(3):
        from_, to = bounds(part, lo, full_lo, full_hi, hi)
        for start in range(from_, to, BN):
            stage, last = n % STAGES, gl.maximum(n - 1, 0)
            before = last % STAGES
            if FEATURES and used is not None:
                if n > 0 and gl.load(used + start // BN - 1) != 0:
                    mbarrier.wait(v_ready.index(before), last // STAGES & 1)
                    linear = _weigh(p, f_smem.index(before), linear)
            mbarrier.wait(k_ready.index(stage), n // STAGES & 1)
            kt = k_smem.index(stage).reshape([BN, D]).permute([1, 0])
            s_ = warpgroup_mma(q, kt, zero, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(before), last // STAGES & 1)
            o_ = warpgroup_mma(p, v_smem.index(before).reshape([BN, DV]), output, is_async=True)
            if FEATURES and used is None:
                f = f_smem.index(before).reshape([BN, NF])
                f_ = warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, narrow, 2)), f, linear, is_async=True)
                s = warpgroup_mma_wait(2, deps=[s_])
            else:
                s = warpgroup_mma_wait(1, deps=[s_])
            mbarrier.arrive(k_free.index(stage))
            new, a, state = absorb(s, state, position, start, b, sizes, rules, results, scale, False, part != 1)
            if FEATURES and used is None:
                output, linear = warpgroup_mma_wait(0, deps=[o_, f_])
            else:
                output = warpgroup_mma_wait(0, deps=[o_])
            if FEATURES:
                linear = linear * gl.convert_layout(a, gl.SliceLayout(1, narrow))[:, None]
            mbarrier.arrive(v_free.index(before), pred=n > 0)
            output = output * gl.convert_layout(a, gl.SliceLayout(1, wide))[:, None]
            p = gl.convert_layout(new.to(q_smem.dtype), weights)
            n += 1
    if lo < hi:
        before = (n - 1) % STAGES
        mbarrier.wait(v_ready.index(before), (n - 1) // STAGES & 1)
        output = warpgroup_mma(p, v_smem.index(before).reshape([BN, DV]), output)
        if FEATURES:
            linear = _weigh(p, f_smem.index(before), linear)
    row, inverse, exists = finish(i, state, linear, results, sizes, sinks, b, h, False)
    store_rows(results.output, output, row, inverse, exists)


@gluon.jit
def _kernel(q_at, k_at, v_at, f_at, used, sinks, results, sizes, rules, scale, feature_batch, STAGES: gl.constexpr):
    BN: gl.constexpr = k_at.block_type.shape[2]
    block = gl.num_programs(0) - 1 - gl.program_id(0)  # under causal masks the last blocks are the longest: first
    b, h = gl.program_id(1) // sizes.heads, gl.program_id(1) % sizes.heads
    row = block * (GROUPS * GROUP_ROWS)
    first = row_positions(row, rules)
    last = row_positions(gl.minimum(row + GROUPS * GROUP_ROWS, sizes.rows) - 1, rules)
    lo, hi, _full_lo, _full_hi = key_range(first, last, b, sizes.keys, rules, BN)
    where = (b, h, h // sizes.group, b * feature_batch, row)
    FEATURES: gl.constexpr = f_at is not None
    q_smem, k_smem, v_smem = buffers(q_at, GROUPS), buffers(k_at, STAGES), buffers(v_at, STAGES)
    at, smem = (q_at, k_at, v_at, v_at), (q_smem, k_smem, v_smem, v_smem)
    if FEATURES:
        at, smem = (q_at, k_at, v_at, f_at), (q_smem, k_smem, v_smem, buffers(f_at, STAGES))
        if used is not None:
            used += b * feature_batch * gl.cdiv(sizes.keys, BN)
    ready, free = barriers(STAGES, 1), barriers(STAGES, GROUPS)
    bars = (barriers(1, 1), ready, free, barriers(STAGES, 1), barriers(STAGES, GROUPS))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_reduce, (0, smem, bars, results, sizes, rules, sinks, scale, where, lo, hi, used, STAGES, FEATURES)),
            (_reduce, (1, smem, bars, results, sizes, rules, sinks, scale, where, lo, hi, used, STAGES, FEATURES)),
            (_fetch, (at, smem, bars, where, lo, hi, STAGES, FEATURES)),
        ],
        [4, 1],
        [240, 24],
    )


def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor | None,
    sinks: Tensor | None,
    results: Any,
    sizes: Any,
    rules: Any,
    scale: float,
    *,
    sparse: bool,
) -> None:
    """Fill ``results`` (``triton_rows.Rows`` with an output); ``columns`` (batch or 1, key, n) in q's type.

    ``sparse``: most rows of ``columns`` are zero, so tiles are asked first; else their product runs beneath the
    exponentials, in smaller tiles for want of registers.
    """
    keys, stages = (128, 2) if columns is None or sparse else (64, 4)
    grid = (triton.cdiv(sizes.rows, GROUPS.value * GROUP_ROWS.value), q.shape[0] * sizes.heads)
    f_at = None if columns is None else tiles(columns, keys)
    batch = int(columns is not None and columns.shape[0] > 1)
    at = tiles(q, GROUP_ROWS.value), tiles(k, keys), tiles(v, keys)
    used = used_tiles(columns, keys) if columns is not None and sparse else None
    with on_device(q):
        _kernel[grid](*at, f_at, used, sinks, results, sizes, rules, scale, batch, STAGES=stages, num_warps=4)
