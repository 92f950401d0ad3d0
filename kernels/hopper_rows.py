"""The row statistics of ``triton_rows`` without the output, for Hopper (see ``hopper``).

A block is 192 queries of one head: three groups of 64 share every tile of keys. Each group multiplies, then takes its
exponentials while the matrix unit works for the others; its sums stay with the threads until the end (``fold``).
Tiles of features that are all zero (most of them, for sinks and spans) cost nothing.
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
    tiles,
    used_tiles,
)
from headscope.kernels.triton_device import on_device

GROUPS = gl.constexpr(3)
STAGES = gl.constexpr(4)
KEYS = 128  # of a tile


@gluon.jit
def _fetch(at, smem, ready, free, where, lo, hi, FEATURES: gl.constexpr):
    """The producer: the block's queries, then its tiles of keys, each with its rows of the features."""
    q_at, k_at, f_at = at
    q_smem, k_smem, f_smem = smem
    b, h, kv, fb, row = where
    BN: gl.constexpr = k_at.block_type.shape[2]
    mbarrier.expect(ready.index(STAGES), GROUPS * q_at.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        fetch(q_at, [b, h, row + group * GROUP_ROWS, 0], ready.index(STAGES), q_smem.index(group))
    n = 0
    for start in range(lo, hi, BN):
        stage = n % STAGES
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        if FEATURES:
            mbarrier.expect(ready.index(stage), k_at.block_type.nbytes + f_at.block_type.nbytes)
            fetch(f_at, [fb, start, 0], ready.index(stage), f_smem.index(stage))
        else:
            mbarrier.expect(ready.index(stage), k_at.block_type.nbytes)
        fetch(k_at, [b, kv, start, 0], ready.index(stage), k_smem.index(stage))
        n += 1


@gluon.jit
def _reduce(
    group: gl.constexpr,
    smem,
    ready,
    free,
    results,
    sizes,
    rules,
    sinks,
    scale,
    where,
    lo,
    hi,
    used,
    FEATURES: gl.constexpr,
):
    """One group: the statistics of 64 rows."""
    q_smem, k_smem, f_smem = smem
    b, h, kv, fb, row = where
    BN: gl.constexpr = k_smem.shape[3]
    D: gl.constexpr = k_smem.shape[4]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    first = row + group * GROUP_ROWS
    i = first + gl.arange(0, GROUP_ROWS, layout=rows)
    position = row_positions(gl.where(i < sizes.rows, i, 0), rules)
    begin = row_positions(gl.minimum(first, sizes.rows - 1), rules)
    end = row_positions(gl.minimum(first + GROUP_ROWS - 1, sizes.rows - 1), rules)
    full_lo, full_hi = full_tiles(begin, end, b, sizes.keys, rules, lo, hi, BN)
    zero = gl.zeros([GROUP_ROWS, BN], gl.float32, mma)
    nothing = fold(zero, True)
    state = (gl.full([GROUP_ROWS], FLOOR, gl.float32, rows), nothing, nothing, nothing)
    linear = 0.0
    if FEATURES:
        NF: gl.constexpr = f_smem.shape[3]
        narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NF, 16])
        linear = gl.zeros([GROUP_ROWS, NF], gl.float32, narrow)
    mbarrier.wait(ready.index(STAGES), 0)
    q = q_smem.index(group).reshape([GROUP_ROWS, D])
    n = 0
    for part in gl.static_range(3):
        from_, to = bounds(part, lo, full_lo, full_hi, hi)
        for start in range(from_, to, BN):
            stage = n % STAGES
            if FEATURES:
                any_ = gl.load(used + start // BN)  # ahead of its use
            mbarrier.wait(ready.index(stage), n // STAGES & 1)
            kt = k_smem.index(stage).reshape([BN, D]).permute([1, 0])
            s = warpgroup_mma(q, kt, zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            if not FEATURES:
                mbarrier.arrive(free.index(stage))
            p, a, state = absorb(s, state, position, start, b, sizes, rules, results, scale, True, part != 1)
            if FEATURES:
                linear = linear * gl.convert_layout(a, gl.SliceLayout(1, narrow))[:, None]
                if any_ != 0:
                    weights = gl.convert_layout(p.to(q_smem.dtype), gl.DotOperandLayout(0, narrow, 2))
                    linear = warpgroup_mma(weights, f_smem.index(stage).reshape([BN, NF]), linear)
                mbarrier.arrive(free.index(stage))
            n += 1
    finish(i, state, linear, results, sizes, sinks, b, h, True)


@gluon.jit
def _kernel(q_at, k_at, f_at, used, sinks, results, sizes, rules, scale, feature_batch, REGISTERS: gl.constexpr):
    BN: gl.constexpr = k_at.block_type.shape[2]
    block = gl.num_programs(0) - 1 - gl.program_id(0)  # under causal masks the last blocks are the longest: first
    b, h = gl.program_id(1) // sizes.heads, gl.program_id(1) % sizes.heads
    row = block * (GROUPS * GROUP_ROWS)
    first = row_positions(row, rules)
    last = row_positions(gl.minimum(row + GROUPS * GROUP_ROWS, sizes.rows) - 1, rules)
    lo, hi, _full_lo, _full_hi = key_range(first, last, b, sizes.keys, rules, BN)
    where = (b, h, h // sizes.group, b * feature_batch, row)
    FEATURES: gl.constexpr = f_at is not None
    q_smem, k_smem = buffers(q_at, GROUPS), buffers(k_at, STAGES)
    at, smem = (q_at, k_at, k_at), (q_smem, k_smem, k_smem)
    if FEATURES:
        at, smem = (q_at, k_at, f_at), (q_smem, k_smem, buffers(f_at, STAGES))
        used += b * feature_batch * gl.cdiv(sizes.keys, BN)
    ready = barriers(STAGES + 1, 1)  # the last one: the queries
    free = barriers(STAGES, GROUPS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_reduce, (0, smem, ready, free, results, sizes, rules, sinks, scale, where, lo, hi, used, FEATURES)),
            (_reduce, (1, smem, ready, free, results, sizes, rules, sinks, scale, where, lo, hi, used, FEATURES)),
            (_reduce, (2, smem, ready, free, results, sizes, rules, sinks, scale, where, lo, hi, used, FEATURES)),
            (_fetch, (at, smem, ready, free, where, lo, hi, FEATURES)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )


def rows(
    q: Tensor,
    k: Tensor,
    columns: Tensor | None,
    sinks: Tensor | None,
    results: Any,
    sizes: Any,
    rules: Any,
    scale: float,
) -> None:
    """Fill ``results`` (``triton_rows.Rows`` without an output); ``columns`` (batch or 1, key, n) in q's type."""
    grid = (triton.cdiv(sizes.rows, GROUPS.value * GROUP_ROWS.value), q.shape[0] * sizes.heads)
    f_at = None if columns is None else tiles(columns, KEYS)
    batch = int(columns is not None and columns.shape[0] > 1)
    with on_device(q):
        _kernel[grid](
            tiles(q, GROUP_ROWS.value),
            tiles(k, KEYS),
            f_at,
            None if columns is None else used_tiles(columns, KEYS),
            sinks,
            results,
            sizes,
            rules,
            scale,
            batch,
            REGISTERS=160,
            num_warps=4,
        )
