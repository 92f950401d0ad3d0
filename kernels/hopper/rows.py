"""The row statistics of ``triton_rows`` without the output, for Hopper (see ``hopper``).

A block is 192 queries of one head: three groups of 64 share every tile of keys. Each group multiplies, then takes its
exponentials while the matrix unit works for the others; its sums stay with the threads until the end (``fold``).
Features that stay the same over many tiles (sinks and spans: nearly everywhere) cost nothing there (``features``).
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
    warpgroup_mma_wait,
)

from headscope.kernels.hopper.bias import COLUMNS, bias_room, bias_tiles, fetch_bias, products
from headscope.kernels.hopper.device import (
    FLOOR,
    GROUP_ROWS,
    absorb,
    barriers,
    block_rows,
    bounds,
    buffers,
    fetch,
    finish,
    fold,
    group_keys,
    group_rows,
    scaled,
    skip,
    taking_turns,
    tile_width,
    tiles,
)
from headscope.kernels.hopper.features import enter, feature_tiles, leave, no_features, of_example, run_of, weigh
from headscope.kernels.triton.device import launch

GROUPS = gl.constexpr(3)


@gluon.jit
def _fetch(at, smem, bars, score, where, lo, hi, FEATURES: gl.constexpr):
    """The producer: the block's queries, then its tiles of keys, each with its rows of the features or its bias."""
    q_at, k_at, f_at, bias_at = at
    q_smem, k_smem, f_smem, bias = smem
    q_ready, ready, free = bars
    b, h, kv, row, example, pattern = where
    BN: gl.constexpr = k_at.block_type.shape[2]
    STAGES: gl.constexpr = k_smem.shape[0]
    mbarrier.expect(q_ready.index(0), GROUPS * q_at.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        fetch(q_at, [b, h, row + group * GROUP_ROWS, 0], q_ready.index(0), q_smem.index(group))
    n = 0
    for start in range(lo, hi, BN):
        stage = n % STAGES
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        if FEATURES:
            mbarrier.expect(ready.index(stage), k_at.block_type.nbytes + f_at.block_type.nbytes)
            fetch(f_at, [example, start, 0], ready.index(stage), f_smem.index(stage))
        elif bias[0].shape[4] == COLUMNS:
            mbarrier.expect(ready.index(stage), k_at.block_type.nbytes + bias_at.block_type.nbytes)
            fetch_bias(bias_at, pattern, h, start, score, ready.index(stage), bias[0].index(stage))
        else:
            mbarrier.expect(ready.index(stage), k_at.block_type.nbytes)
        fetch(k_at, [b, kv, start, 0], ready.index(stage), k_smem.index(stage))
        n += 1


@gluon.jit
def _tile(n, start, q, smem, bars, position, state, linear, given, MASKED: gl.constexpr, MIXED: gl.constexpr):
    """The n-th tile of keys: (the next n, the sums, the sums of features where the tile's are ``MIXED``)."""
    _q_smem, k_smem, f_smem, bias = smem
    _q_ready, ready, free = bars
    b, h, sizes, rules, results, score = given
    STAGES: gl.constexpr = k_smem.shape[0]
    stage = n % STAGES
    mbarrier.wait(ready.index(stage), n // STAGES & 1)
    s = warpgroup_mma_wait(0, deps=[products(q, k_smem, stage, bias)])
    if not MIXED:
        mbarrier.arrive(free.index(stage))
    p, a, state = absorb(s, state, position, start, b, h, sizes, rules, results, score, True, MASKED)
    if MIXED:
        linear = weigh(p.to(q.dtype), f_smem.index(stage), scaled(linear, a))
        mbarrier.arrive(free.index(stage))
    return n + 1, state, linear


@gluon.jit
def _reduce(group: gl.constexpr, smem, bars, columns, sinks, given, where, lo, hi, FEATURES: gl.constexpr):
    """One group: the statistics of 64 rows."""
    q_smem, k_smem, f_smem, _bias = smem
    q_ready, ready, free = bars
    b, h, sizes, rules, results, score = given
    _b, _h, _kv, row, _example, _pattern = where
    BN: gl.constexpr = k_smem.shape[3]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    first = row + group * GROUP_ROWS
    i, position = group_rows(first, sizes, rules, rows)
    mine, full_lo, full_hi, stop = group_keys(first, b, sizes, rules, lo, hi, BN)
    nothing = fold(gl.zeros([GROUP_ROWS, BN], gl.float32, mma), True)
    state = (gl.full([GROUP_ROWS], FLOOR, gl.float32, rows), nothing, nothing, nothing)
    linear = no_features(f_smem.shape[3] if FEATURES else 16)
    mbarrier.wait(q_ready.index(0), 0)
    q = q_smem.index(group).reshape([GROUP_ROWS, q_smem.shape[4]])
    n = skip(0, mine - lo, ready, free, BN)
    for part in gl.static_range(3):
        start, to = bounds(part, mine, full_lo, full_hi, stop)
        if FEATURES and part == 1:
            while start < to:
                until, c = run_of(columns, start, to, linear, BN)
                if until > 0:
                    before = state[0]
                    linear = enter(linear, c, state[1], True)
                    for at in range(start, until, BN):
                        n, state, linear = _tile(n, at, q, smem, bars, position, state, linear, given, False, False)
                    linear = leave(linear, c, before, state, True)
                else:
                    for at in range(start, -until, BN):
                        n, state, linear = _tile(n, at, q, smem, bars, position, state, linear, given, False, True)
                start = gl.maximum(until, -until)
        else:
            for at in range(start, to, BN):
                n, state, linear = _tile(n, at, q, smem, bars, position, state, linear, given, part != 1, FEATURES)
    skip(n, hi - mine - gl.cdiv(stop - mine, BN) * BN, ready, free, BN)
    finish(i, state, linear, results, sizes, sinks, b, h, True)


@gluon.jit
def _kernel(
    q_at,
    k_at,
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
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """``batch`` is 1 where every example has features of its own, else 0."""
    BN: gl.constexpr = k_at.block_type.shape[2]
    FEATURES: gl.constexpr = f_at is not None
    b, h, row, lo, hi = block_rows(together, GROUPS * GROUP_ROWS, sizes, rules, BN)
    example = b // sizes.repeat
    where = (example, h, h // sizes.group, row, example * batch, b)
    q_smem, k_smem = buffers(q_at, GROUPS), buffers(k_at, STAGES)
    bias = (k_smem, k_smem)
    if bias_at is not None:
        bias = bias_room(bias_at, STAGES)
    at, smem = (q_at, k_at, k_at, bias_at), (q_smem, k_smem, k_smem, bias)
    if FEATURES:
        at, smem = (q_at, k_at, f_at, bias_at), (q_smem, k_smem, buffers(f_at, STAGES), bias)
        columns = of_example(columns, example * batch, sizes.keys, BN, f_at.block_type.shape[2])
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, GROUPS))
    given = (b, h, sizes, rules, results, score)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_reduce, (0, smem, bars, columns, sinks, given, where, lo, hi, FEATURES)),
            (_reduce, (1, smem, bars, columns, sinks, given, where, lo, hi, FEATURES)),
            (_reduce, (2, smem, bars, columns, sinks, given, where, lo, hi, FEATURES)),
            (_fetch, (at, smem, bars, score, where, lo, hi, FEATURES)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )


def shape(width: int, features: int) -> tuple[int, int]:
    """Keys of a tile and how many tiles wait, for tiles ``width`` wide beside ``features`` columns (shared memory)."""
    if width <= 128:
        return 128, 4
    return (64, 3) if features else (128, 2)


def rows(
    q: Tensor,
    k: Tensor,
    columns: Tensor | None,
    sinks: Tensor | None,
    results: Any,
    sizes: Any,
    rules: Any,
    score: Any,
) -> None:
    """Fill ``results`` (``triton_rows.Rows``, no output); ``columns`` (key, n) or (batch, key, n) in q's type."""
    pairs = q.shape[0] * sizes.repeat * sizes.heads
    together = taking_turns(pairs, k[0, 0].nbytes // sizes.group)
    grid = (triton.cdiv(sizes.rows, GROUPS.value * GROUP_ROWS.value) * pairs,)
    width = tile_width(q.shape[3])
    keys, stages = shape(width, 0 if columns is None else columns.shape[-1])
    f_at, features, batch = feature_tiles(columns, keys, asked=True)
    bias_at, score = bias_tiles(q, score, columns, keys)
    at = tiles(q, GROUP_ROWS.value, width), tiles(k, keys, width), f_at, bias_at
    given = sinks, results, sizes, rules, score, batch, together
    launch(_kernel, grid, q, *at, features, *given, STAGES=stages, REGISTERS=160, num_warps=4)
