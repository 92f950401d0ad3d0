"""The column reductions of ``triton_columns``, for Hopper (see ``hopper``).

A block is 384 keys of one head, 128 a group (64 of wide heads), which stay; queries stream past in tiles of 64. The
groups take turns at the matrix unit: one multiplies, then takes exponentials and sums while the others multiply. Rows r
and r + 8 of a tile are one thread's, so it adds them at once and keeps half as many sums.
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
    HIDDEN,
    LOG2E,
    barriers,
    bounds,
    buffers,
    fetch,
    pass_turn,
    place,
    query_range,
    seen_in_tile,
    take_turn,
    taking_turns,
    tile_width,
    tiles,
)
from headscope.kernels.hopper.scores import key_bias, scored
from headscope.kernels.triton.device import launch

GROUPS = gl.constexpr(3)


@gluon.jit
def _fetch(at, smem, bars, where, lo, hi):
    """The producer: the block's keys, then its tiles of queries."""
    q_at, k_at = at
    q_smem, k_smem = smem
    k_ready, ready, free, _turn = bars
    b, h, kv, begin = where
    KEYS: gl.constexpr = k_smem.shape[3]
    STAGES: gl.constexpr = q_smem.shape[0]
    mbarrier.expect(k_ready.index(0), GROUPS * k_at.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        fetch(k_at, [b, kv, begin + group * KEYS, 0], k_ready.index(0), k_smem.index(group))
    n = 0
    for start in range(lo, hi, GROUP_ROWS):
        stage = n % STAGES
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(stage), q_at.block_type.nbytes)
        fetch(q_at, [b, h, start, 0], ready.index(stage), q_smem.index(stage))
        n += 1


@gluon.jit
def _norm(lse, start, hi, b, rules, rows: gl.constexpr):
    """The lse of the rows from ``start``, in units of ln 2; +inf for rows that give nothing."""
    i = start + gl.arange(0, GROUP_ROWS, layout=rows)
    norm = gl.load(lse + i, mask=i < hi, other=float("inf"))
    norm = gl.where(norm == float("-inf"), float("inf"), norm * LOG2E)
    position = i + rules.query_offset
    if rules.start is not None:
        norm = gl.where(position >= gl.load(rules.start + b).to(gl.int32), norm, float("inf"))
    if rules.end is not None:
        norm = gl.where(position < gl.load(rules.end + b).to(gl.int32), norm, float("inf"))
    return norm


@gluon.jit
def _pairs(p):
    """(row, key) as (row // 16, pair, 8, key): rows r and r + 8 side by side."""
    return p.reshape([p.shape[0] // 16, 2, 8, p.shape[1]])


@gluon.jit
def _gather(
    s,
    bias,
    norm,
    sums,
    start,
    mine,
    where,
    sizes,
    rules,
    score,
    part: gl.constexpr,
    SUM: gl.constexpr,
    MAX: gl.constexpr,
):
    """Add the weights of products ``s`` with the keys from ``mine`` to their sums and maxima."""
    total, highest = sums
    b, _h, _kv, _begin = where
    j = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    s, unit = scored(s, score, bias)
    if part != 1:
        rows: gl.constexpr = gl.SliceLayout(1, s.type.layout)
        position = start + gl.arange(0, GROUP_ROWS, layout=rows) + rules.query_offset
        s = gl.where(seen_in_tile(position, j, mine, b, sizes, rules), s, HIDDEN)
    p = _pairs(gl.exp2(s * unit - norm[:, None]))
    if SUM:
        total += gl.sum(p, 1)
    if MAX:
        highest = gl.maximum(highest, gl.max(p, 1))
    return total, highest


@gluon.jit
def _parts(mine, lo, hi, b, sizes, rules, KEYS: gl.constexpr):
    """The part of the queries ``lo:hi`` that see a group's keys from ``mine``, and that of tiles which see them all."""
    low, high, keys = sizes.first, sizes.stop, sizes.keys
    first, stop, full_lo, full_hi = query_range(mine, KEYS, b, low, high, keys, rules, GROUP_ROWS)
    first = gl.maximum(first, lo)
    stop = gl.maximum(gl.minimum(stop, hi), first)
    full_lo = gl.maximum(full_lo, first)
    return first, full_lo, gl.maximum(gl.minimum(full_hi, stop), full_lo), stop


@gluon.jit
def _skip(n, queries, group: gl.constexpr, bars):
    """Tiles of queries that see none of this group's keys: the next n."""
    _k_ready, ready, free, turn = bars
    STAGES: gl.constexpr = ready.shape[0]
    for passed in range(0, queries, GROUP_ROWS):
        at = n + passed // GROUP_ROWS
        mbarrier.wait(ready.index(at % STAGES), at // STAGES & 1)
        take_turn(turn, group, at)
        pass_turn(turn, group, GROUPS)
        mbarrier.arrive(free.index(at % STAGES))
    return n + gl.cdiv(gl.maximum(queries, 0), GROUP_ROWS)


@gluon.jit
def _reduce(group: gl.constexpr, smem, bars, lse, key_sum, key_max, sizes, rules, score, where, lo, hi):
    """One group: the sums and maxima of its 128 keys."""
    q_smem, k_smem = smem
    k_ready, ready, free, turn = bars
    b, h, _kv, begin = where
    D: gl.constexpr = k_smem.shape[4]
    KEYS: gl.constexpr = k_smem.shape[3]
    STAGES: gl.constexpr = q_smem.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    keys: gl.constexpr = gl.SliceLayout(0, mma)
    SUM: gl.constexpr = key_sum is not None
    MAX: gl.constexpr = key_max is not None
    mine = begin + group * KEYS
    j = mine + gl.arange(0, KEYS, layout=keys)
    bias = key_bias(score, b, h, mine, gl.arange(0, KEYS, layout=keys), sizes.keys, True)
    first, full_lo, full_hi, stop = _parts(mine, lo, hi, b, sizes, rules, KEYS)
    lse += (b.to(gl.int64) * sizes.heads + h) * sizes.queries
    zero = gl.zeros([GROUP_ROWS, KEYS], gl.float32, mma)
    nothing = gl.sum(_pairs(zero), 1)
    sums = (nothing, nothing)
    mbarrier.wait(k_ready.index(0), 0)
    kt = k_smem.index(group).reshape([KEYS, D]).permute([1, 0])
    n = _skip(0, first - lo, group, bars)
    for part in gl.static_range(3):
        from_, to = bounds(part, first, full_lo, full_hi, stop)
        for start in range(from_, to, GROUP_ROWS):
            stage = n % STAGES
            norm = _norm(lse, start, hi, b, rules, rows)
            mbarrier.wait(ready.index(stage), n // STAGES & 1)
            take_turn(turn, group, n)
            s = warpgroup_mma(q_smem.index(stage).reshape([GROUP_ROWS, D]), kt, zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            pass_turn(turn, group, GROUPS)
            mbarrier.arrive(free.index(stage))
            sums = _gather(s, bias, norm, sums, start, mine, where, sizes, rules, score, part, SUM, MAX)
            n += 1
    _skip(n, hi - first - gl.cdiv(stop - first, GROUP_ROWS) * GROUP_ROWS, group, bars)
    total, highest = sums
    out = (b.to(gl.int64) * sizes.heads + h) * sizes.keys + j
    if SUM:
        gl.store(key_sum + out, gl.convert_layout(gl.sum(gl.sum(total, 0), 0), keys), mask=j < sizes.keys)
    if MAX:
        gl.store(key_max + out, gl.convert_layout(gl.max(gl.max(highest, 0), 0), keys), mask=j < sizes.keys)


@gluon.jit
def _kernel(
    q_at,
    k_at,
    lse,
    key_sum,
    key_max,
    sizes,
    rules,
    score,
    together,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    KEYS: gl.constexpr = k_at.block_type.shape[2]
    block, b, h = place(gl.cdiv(sizes.keys, KEYS * GROUPS), sizes.heads, together)
    begin = block * (KEYS * GROUPS)  # under causal masks the first keys are seen by the most queries: they go first
    first, stop, keys = sizes.first, sizes.stop, sizes.keys
    lo, hi, _full_lo, _full_hi = query_range(begin, KEYS * GROUPS, b, first, stop, keys, rules, GROUP_ROWS)
    where = (b, h, h // sizes.group, begin)
    smem = (buffers(q_at, STAGES), buffers(k_at, GROUPS))
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(GROUPS, 1))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_reduce, (0, smem, bars, lse, key_sum, key_max, sizes, rules, score, where, lo, hi)),
            (_reduce, (1, smem, bars, lse, key_sum, key_max, sizes, rules, score, where, lo, hi)),
            (_reduce, (2, smem, bars, lse, key_sum, key_max, sizes, rules, score, where, lo, hi)),
            (_fetch, ((q_at, k_at), smem, bars, where, lo, hi)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )


def shape(width: int) -> tuple[int, int]:
    """Keys of a group and how many tiles of queries wait, for tiles ``width`` wide (shared memory)."""
    return (128, 4) if width <= 128 else (64, 3)


def columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    sums: Tensor | None,
    highest: Tensor | None,
    sizes: Any,
    rules: Any,
    score: Any,
) -> None:
    """Fill ``sums`` and ``highest`` (batch, head, key), each where it is wanted."""
    pairs = q.shape[0] * sizes.heads
    together = taking_turns(pairs, q[0, 0].nbytes)
    width = tile_width(q.shape[3])
    keys, stages = shape(width)
    grid = (triton.cdiv(sizes.keys, GROUPS.value * keys) * pairs,)
    at = tiles(q, GROUP_ROWS.value, width), tiles(k, keys, width)
    given = lse, sums, highest, sizes, rules, score, together
    launch(_kernel, grid, q, *at, *given, STAGES=stages, REGISTERS=160, num_warps=4)
