"""Row statistics and the attention output in one pass, for Hopper (see ``hopper``).

A block is 128 queries of one head, 64 a group. As in FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608, 3.2), the
product of the last tile's weights with its values runs beneath this tile's exponentials:

1. issue S = q k_n^T, then O += p_{n-1} v_{n-1};
2. wait for S alone; p_n and the statistics (steps 1 to 4 of ``triton_rows``);
3. wait for O, and scale it to the new maximum.

At d_head 64 the exponentials take as long as both products, so the groups take turns: one multiplies while the other
takes exponentials (ibid., 3.1). Features come in two ways. Where most keys share theirs with their neighbours (sinks,
spans), tiles are asked as in ``hopper_rows``; else their product is issued beside that of the values, one tile late.
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
    block_rows,
    bounds,
    buffers,
    enter,
    feature_tiles,
    fetch,
    finish,
    fold,
    group_keys,
    group_rows,
    leave,
    no_features,
    of_example,
    pass_turn,
    run_of,
    scaled,
    store_rows,
    take_turn,
    taking_turns,
    tiles,
    weigh,
)
from headscope.kernels.triton_device import on_device

GROUPS = gl.constexpr(2)
ABSENT = gl.constexpr(0)  # features: there are none;
BESIDE = gl.constexpr(1)  # their product is issued beside that of the values;
APART = gl.constexpr(2)  # tiles are asked whether they need one


@gluon.jit
def _fetch(at, smem, bars, where, lo, hi, FEATURES: gl.constexpr):
    """The producer: the block's queries, then tiles of keys and of values, the latter with the features' rows."""
    q_at, k_at, v_at, f_at = at
    q_smem, k_smem, v_smem, f_smem = smem
    q_ready, k_ready, k_free, v_ready, v_free, _turn = bars
    b, h, kv, fb, row = where
    STAGES: gl.constexpr = k_smem.shape[0]
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
        if FEATURES != ABSENT:
            mbarrier.expect(v_ready.index(stage), v_at.block_type.nbytes + f_at.block_type.nbytes)
            fetch(f_at, [fb, start, 0], v_ready.index(stage), f_smem.index(stage))
        else:
            mbarrier.expect(v_ready.index(stage), v_at.block_type.nbytes)
        fetch(v_at, [b, kv, start, 0], v_ready.index(stage), v_smem.index(stage))
        n += 1


@gluon.jit
def _tile(n, start, group: gl.constexpr, q, smem, bars, position, sums, given, MASKED: gl.constexpr, F: gl.constexpr):
    """Steps 1 to 3 for the n-th tile of keys: the next n, and the sums (state, p, output, linear)."""
    _q_smem, k_smem, v_smem, f_smem = smem
    _q_ready, k_ready, k_free, v_ready, v_free, turn = bars
    state, p, output, linear = sums
    b, sizes, rules, results, scale = given
    STAGES: gl.constexpr = k_smem.shape[0]
    BN: gl.constexpr = k_smem.shape[3]
    D: gl.constexpr = k_smem.shape[4]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    stage, last = n % STAGES, gl.maximum(n - 1, 0)
    before = last % STAGES
    mbarrier.wait(k_ready.index(stage), n // STAGES & 1)
    kt = k_smem.index(stage).reshape([BN, D]).permute([1, 0])
    if D < 128:
        take_turn(turn, group, n)
    s_ = warpgroup_mma(q, kt, gl.zeros([GROUP_ROWS, BN], gl.float32, mma), use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), last // STAGES & 1)
    o_ = warpgroup_mma(p, v_smem.index(before).reshape([BN, v_smem.shape[4]]), output, is_async=True)
    if F == BESIDE:
        f = f_smem.index(before).reshape([BN, f_smem.shape[3]])
        weights = gl.convert_layout(p, gl.DotOperandLayout(0, linear.type.layout, 2))
        f_ = warpgroup_mma(weights, f, linear, is_async=True)
    if D < 128:
        pass_turn(turn, group, GROUPS)
    s = warpgroup_mma_wait(2 if F == BESIDE else 1, deps=[s_])
    mbarrier.arrive(k_free.index(stage))
    new, a, state = absorb(s, state, position, start, b, sizes, rules, results, scale, False, MASKED)
    if F == BESIDE:
        output, linear = warpgroup_mma_wait(0, deps=[o_, f_])
    else:
        output = warpgroup_mma_wait(0, deps=[o_])
    mbarrier.arrive(v_free.index(before), pred=n > 0)
    output = scaled(output, a)
    p = gl.convert_layout(new.to(q.dtype), gl.DotOperandLayout(0, output.type.layout, 2))
    if F != ABSENT:
        linear = scaled(linear, a)
    if F == APART:
        mbarrier.wait(v_ready.index(stage), n // STAGES & 1)
        linear = weigh(p, f_smem.index(stage), linear)
    return n + 1, (state, p, output, linear)


@gluon.jit
def _reduce(group: gl.constexpr, smem, bars, columns, sinks, given, where, lo, hi, F: gl.constexpr):
    """One group: the statistics and the output of 64 rows."""
    q_smem, k_smem, v_smem, f_smem = smem
    q_ready, _k_ready, _k_free, v_ready, _v_free, _turn = bars
    b, sizes, rules, results, scale = given
    _b, h, _kv, _fb, row = where
    BN: gl.constexpr = k_smem.shape[3]
    DV: gl.constexpr = v_smem.shape[4]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    first = row + group * GROUP_ROWS
    i, position = group_rows(first, sizes, rules, rows)
    _lo, full_lo, full_hi, _hi = group_keys(first, b, sizes, rules, lo, hi, BN)
    nothing = fold(gl.zeros([GROUP_ROWS, BN], gl.float32, mma), False)
    state = (gl.full([GROUP_ROWS], FLOOR, gl.float32, rows), nothing, nothing, nothing)
    p = gl.zeros([GROUP_ROWS, BN], q_smem.dtype, gl.DotOperandLayout(0, wide, 2))  # weights of the tile before: none
    linear = no_features(f_smem.shape[3] if F != ABSENT else 16)
    sums = (state, p, gl.zeros([GROUP_ROWS, DV], gl.float32, wide), linear)
    mbarrier.wait(q_ready.index(0), 0)
    q = q_smem.index(group).reshape([GROUP_ROWS, q_smem.shape[4]])
    n = 0
    for part in gl.static_range(3):
        start, to = bounds(part, lo, full_lo, full_hi, hi)
        if F == APART and part == 1:
            while start < to:
                state, p, output, linear = sums
                stop, c = run_of(columns, start, to, linear, BN)
                if stop > 0:
                    before = state[0]
                    sums = (state, p, output, enter(linear, c, state[1], False))
                    for at in range(start, stop, BN):
                        n, sums = _tile(n, at, group, q, smem, bars, position, sums, given, False, ABSENT)
                    state, p, output, linear = sums
                    sums = (state, p, output, leave(linear, c, before, state, False))
                else:
                    for at in range(start, -stop, BN):
                        n, sums = _tile(n, at, group, q, smem, bars, position, sums, given, False, APART)
                start = gl.maximum(stop, -stop)
        else:
            for at in range(start, to, BN):
                n, sums = _tile(n, at, group, q, smem, bars, position, sums, given, part != 1, F)
    state, p, output, linear = sums
    if lo < hi:
        before = (n - 1) % k_smem.shape[0]
        mbarrier.wait(v_ready.index(before), (n - 1) // k_smem.shape[0] & 1)
        output = warpgroup_mma(p, v_smem.index(before).reshape([BN, DV]), output)
        if F == BESIDE:
            linear = weigh(p, f_smem.index(before), linear)
    row, inverse, exists = finish(i, state, linear, results, sizes, sinks, b, h, False)
    store_rows(results.output, output, row, inverse, exists, DV)


@gluon.jit
def _kernel(
    q_at, k_at, v_at, f_at, columns, sinks, results, sizes, rules, scale, batch, together, STAGES: gl.constexpr
):
    """``columns`` (values, runs): features ``APART``; where it is None, ``f_at`` are to be multiplied ``BESIDE``."""
    BN: gl.constexpr = k_at.block_type.shape[2]
    F: gl.constexpr = ABSENT if f_at is None else BESIDE if columns is None else APART
    b, h, row, lo, hi = block_rows(together, GROUPS * GROUP_ROWS, sizes, rules, BN)
    where = (b, h, h // sizes.group, b * batch, row)
    q_smem, k_smem, v_smem = buffers(q_at, GROUPS), buffers(k_at, STAGES), buffers(v_at, STAGES)
    at, smem = (q_at, k_at, v_at, v_at), (q_smem, k_smem, v_smem, v_smem)
    if F != ABSENT:
        at, smem = (q_at, k_at, v_at, f_at), (q_smem, k_smem, v_smem, buffers(f_at, STAGES))
    if F == APART:
        columns = of_example(columns, b * batch, sizes.keys, BN, f_at.block_type.shape[2])
    ready, free = barriers(STAGES, 1), barriers(STAGES, GROUPS)
    bars = (barriers(1, 1), ready, free, barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(GROUPS, 1))
    given = (b, sizes, rules, results, scale)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_reduce, (0, smem, bars, columns, sinks, given, where, lo, hi, F)),
            (_reduce, (1, smem, bars, columns, sinks, given, where, lo, hi, F)),
            (_fetch, (at, smem, bars, where, lo, hi, F)),
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
    """Fill ``results`` (``triton_rows.Rows`` with an output); ``columns`` (key, n) or (batch, key, n) in q's type.

    ``sparse``: most tiles of keys share one row of ``columns``, so at d_head 128 they are asked; else each is
    multiplied, there in smaller tiles for want of registers. At 64 that costs less than asking does.
    """
    keys, stages = (128, 3) if q.shape[3] < 128 else (128, 2) if columns is None or sparse else (64, 4)
    pairs = q.shape[0] * sizes.heads
    together = taking_turns(pairs, k[0, 0].nbytes // sizes.group)
    grid = (triton.cdiv(sizes.rows, GROUPS.value * GROUP_ROWS.value) * pairs,)
    at = tiles(q, GROUP_ROWS.value), tiles(k, keys), tiles(v, keys)
    f_at, features, batch = feature_tiles(columns, keys, asked=sparse and q.shape[3] == 128)
    with on_device(q):
        _kernel[grid](
            *at, f_at, features, sinks, results, sizes, rules, scale, batch, together, STAGES=stages, num_warps=4
        )
