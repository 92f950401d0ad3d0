"""Row statistics and the attention output in one pass, for Hopper (see ``hopper``).

A group holds 64 queries, as in ``hopper_rows``. At d_head 64 three share a block, and each multiplies its weights with
the values at once: its wait is the others' work. At 128 a group needs registers for its output, which leaves room for
two. So the product of the last tile's weights with its values runs beneath this tile's exponentials, as in
FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608, 3.2):

1. issue S = q k_n^T, then O += p_{n-1} v_{n-1};
2. wait for S alone; p_n and the statistics (steps 1 to 4 of ``triton_rows``);
3. wait for O, and scale it to the new maximum.

Features come in two ways. Where most keys share theirs with their neighbours (sinks, spans), tiles are asked as in
``hopper_rows``; else their product is issued beside that of the values.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from headscope.kernels.hopper.bias import COLUMNS, bias_room, bias_tiles, fetch_bias
from headscope.kernels.hopper.device import (
    FLOOR,
    GROUP_ROWS,
    barriers,
    block_rows,
    bounds,
    buffers,
    fetch,
    finish,
    fold,
    group_keys,
    group_rows,
    store_rows,
    taking_turns,
    tile_width,
    tiles,
)
from headscope.kernels.hopper.features import feature_tiles, no_features, of_example
from headscope.kernels.hopper.output_tiles import (
    ABSENT,
    APART,
    BESIDE,
    add_runs,
    add_tile,
    multiply,
    skip_both,
    wait_for,
)
from headscope.kernels.triton.device import launch


@gluon.jit
def _fetch(at, smem, bars, score, where, lo, hi, FEATURES: gl.constexpr):
    """The producer: the block's queries, then tiles of keys, with their bias, and of values, with their features."""
    q_at, k_at, v_at, f_at, bias_at = at
    q_smem, k_smem, v_smem, f_smem, bias = smem
    q_ready, k_ready, k_free, v_ready, v_free = bars
    b, h, kv, fb, row, pattern = where
    GROUPS: gl.constexpr = q_smem.shape[0]
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
        if bias[0].shape[4] == COLUMNS:
            mbarrier.expect(k_ready.index(stage), k_at.block_type.nbytes + bias_at.block_type.nbytes)
            fetch_bias(bias_at, pattern, h, start, score, k_ready.index(stage), bias[0].index(stage))
        else:
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
def _reduce(group: gl.constexpr, smem, bars, columns, sinks, given, where, lo, hi, F: gl.constexpr, dv: gl.constexpr):
    """One group: the statistics and the output of 64 rows."""
    q_smem, k_smem, v_smem, f_smem, _bias = smem
    q_ready, k_ready, k_free, v_ready, v_free = bars
    b, h, sizes, rules, results, score = given
    _b, _h, _kv, _fb, row, _pattern = where
    LATE: gl.constexpr = q_smem.shape[0] == 2
    BN: gl.constexpr = k_smem.shape[3]
    DV: gl.constexpr = v_smem.shape[4]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    first = row + group * GROUP_ROWS
    i, position = group_rows(first, sizes, rules, rows)
    mine, full_lo, full_hi, stop = group_keys(first, b, sizes, rules, lo, hi, BN)
    n = 0
    if LATE:  # its first tile may not be one that was passed on
        mine, stop = lo, hi
    else:
        n = skip_both(0, mine - lo, bars, BN)
    nothing = fold(gl.zeros([GROUP_ROWS, BN], gl.float32, mma), not LATE)
    state = (gl.full([GROUP_ROWS], FLOOR, gl.float32, rows), nothing, nothing, nothing)
    p = gl.zeros([GROUP_ROWS, BN], q_smem.dtype, gl.DotOperandLayout(0, wide, 2))  # weights of the tile before: none
    linear = no_features(f_smem.shape[3] if F != ABSENT else 16)
    sums = (state, p, gl.zeros([GROUP_ROWS, DV], gl.float32, wide), linear)
    mbarrier.wait(q_ready.index(0), 0)
    q = q_smem.index(group).reshape([GROUP_ROWS, q_smem.shape[4]])
    for part in gl.static_range(3):
        start, to = bounds(part, mine, full_lo, full_hi, stop)
        if F == APART and part == 1:
            n, sums = add_runs(n, start, to, columns, q, smem, bars, position, sums, given)
        else:
            for at in range(start, to, BN):
                n, sums = add_tile(n, at, q, smem, bars, position, sums, given, part != 1, F)
    state, p, output, linear = sums
    if LATE:
        if lo < hi:
            last = (n - 1) % k_smem.shape[0]
            mbarrier.wait(v_ready.index(last), (n - 1) // k_smem.shape[0] & 1)
            output, linear = wait_for(*multiply(p, last, smem, output, linear, F), F)
    else:
        skip_both(n, hi - mine - gl.cdiv(stop - mine, BN) * BN, bars, BN)
    row, inverse, exists = finish(i, state, linear, results, sizes, sinks, b, h, not LATE)
    store_rows(results.output, output, row, inverse, exists, dv)


@gluon.jit
def _kernel(
    q_at,
    k_at,
    v_at,
    f_at,
    bias_at,
    columns,
    sinks,
    results,
    sizes,
    rules,
    score,
    batch,
    together,
    dv: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """``columns`` (values, runs): features ``APART``; where it is None, ``f_at`` are to be multiplied ``BESIDE``."""
    BN: gl.constexpr = k_at.block_type.shape[2]
    F: gl.constexpr = ABSENT if f_at is None else BESIDE if columns is None else APART
    b, h, row, lo, hi = block_rows(together, GROUPS * GROUP_ROWS, sizes, rules, BN)
    example = b // sizes.repeat
    where = (example, h, h // sizes.group, example * batch, row, b)
    q_smem, k_smem, v_smem = buffers(q_at, GROUPS), buffers(k_at, STAGES), buffers(v_at, STAGES)
    bias = (k_smem, k_smem)
    if bias_at is not None:
        bias = bias_room(bias_at, STAGES)
    at, smem = (q_at, k_at, v_at, v_at, bias_at), (q_smem, k_smem, v_smem, v_smem, bias)
    if F != ABSENT:
        at, smem = (q_at, k_at, v_at, f_at, bias_at), (q_smem, k_smem, v_smem, buffers(f_at, STAGES), bias)
    if F == APART:
        columns = of_example(columns, example * batch, sizes.keys, BN, f_at.block_type.shape[2])
    ready, free = barriers(STAGES, 1), barriers(STAGES, GROUPS)
    bars = (barriers(1, 1), ready, free, barriers(STAGES, 1), barriers(STAGES, GROUPS))
    given = (b, h, sizes, rules, results, score)
    fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_reduce, (0, smem, bars, columns, sinks, given, where, lo, hi, F, dv)),
                (_reduce, (1, smem, bars, columns, sinks, given, where, lo, hi, F, dv)),
                (_fetch, (at, smem, bars, score, where, lo, hi, F)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_reduce, (0, smem, bars, columns, sinks, given, where, lo, hi, F, dv)),
                (_reduce, (1, smem, bars, columns, sinks, given, where, lo, hi, F, dv)),
                (_reduce, (2, smem, bars, columns, sinks, given, where, lo, hi, F, dv)),
                (_fetch, (at, smem, bars, score, where, lo, hi, F)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def shape(width: int) -> tuple[int, int, int]:
    """Groups of a block, how many tiles of keys and values wait, and keys of a tile, for tiles ``width`` wide.

    At 256 a group's output takes 128 registers of a thread: beside it a tile of 64 keys fits.
    """
    if width <= 64:
        return 3, 3, 128
    return 2, 2, 128 if width <= 128 else 64


def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor | None,
    sinks: Tensor | None,
    results: Any,
    sizes: Any,
    rules: Any,
    score: Any,
    *,
    sparse: bool,
) -> None:
    """Fill ``results`` (``triton_rows.Rows`` with an output); ``columns`` (key, n) or (batch, key, n) in q's type.

    ``sparse``: most tiles of keys share one row of ``columns``, so they are asked; else each is multiplied.
    """
    width = tile_width(q.shape[3])
    groups, stages, keys = shape(width)
    pairs = q.shape[0] * sizes.repeat * sizes.heads
    together = taking_turns(pairs, k[0, 0].nbytes // sizes.group)
    grid = (triton.cdiv(sizes.rows, groups * GROUP_ROWS.value) * pairs,)
    at = tiles(q, GROUP_ROWS.value, width), tiles(k, keys, width), tiles(v, keys, width)
    f_at, features, batch = feature_tiles(columns, keys, asked=sparse)
    bias_at, score = bias_tiles(q, score, columns, keys)
    given = sinks, results, sizes, rules, score, batch, together
    launch(
        _kernel, grid, q, *at, f_at, bias_at, features, *given, dv=v.shape[3], GROUPS=groups, STAGES=stages, num_warps=4
    )
