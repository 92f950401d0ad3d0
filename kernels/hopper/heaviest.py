"""The two walks of ``triton.heaviest``, for Hopper (see ``hopper``): lists of the keys that may be among the heaviest.

Blocks are those of ``hopper.rows``. In the matrix unit's layout four threads share a row, and each keeps a list of its
own of the row's keys: it knows by a counter where the next goes, and asks no other thread. What a score costs is a
maximum in the first walk, and in the second a comparison and stores that seldom happen.
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
    FLOOR,
    GROUP_ROWS,
    HIDDEN,
    LOG2E,
    barriers,
    block_rows,
    bounds,
    buffers,
    fetch,
    group_keys,
    group_rows,
    seen_in_tile,
    skip,
    taking_turns,
    tile_width,
    tiles,
)
from headscope.kernels.hopper.rows import shape
from headscope.kernels.hopper.scores import key_bias, scored
from headscope.kernels.triton.device import launch

GROUPS = gl.constexpr(3)


@gluon.jit
def _fetch(at, smem, bars, where, lo, hi):
    """The producer: the block's queries, then its tiles of keys, twice."""
    q_at, k_at = at
    q_smem, k_smem = smem
    q_ready, ready, free = bars
    b, h, kv, row = where
    BN: gl.constexpr = k_at.block_type.shape[2]
    STAGES: gl.constexpr = k_smem.shape[0]
    mbarrier.expect(q_ready.index(0), GROUPS * q_at.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        fetch(q_at, [b, h, row + group * GROUP_ROWS, 0], q_ready.index(0), q_smem.index(group))
    n = 0
    for _walk in range(2):
        for start in range(lo, hi, BN):
            stage = n % STAGES
            mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), k_at.block_type.nbytes)
            fetch(k_at, [b, kv, start, 0], ready.index(stage), k_smem.index(stage))
            n += 1


@gluon.jit
def _scores(n, start, q, smem, bars, position, given, MASKED: gl.constexpr):
    """Scores (row, key) of the n-th tile of keys, to be multiplied by ``_unit``."""
    _q_smem, k_smem = smem
    _q_ready, ready, free = bars
    b, h, sizes, rules, score = given
    BN: gl.constexpr = k_smem.shape[3]
    STAGES: gl.constexpr = k_smem.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    j = gl.arange(0, BN, layout=gl.SliceLayout(0, mma))
    stage = n % STAGES
    mbarrier.wait(ready.index(stage), n // STAGES & 1)
    kt = k_smem.index(stage).reshape([BN, k_smem.shape[4]]).permute([1, 0])
    s = warpgroup_mma(q, kt, gl.zeros([GROUP_ROWS, BN], gl.float32, mma), use_acc=False, is_async=True)
    bias = key_bias(score, b, h, start, j, sizes.keys, MASKED)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(free.index(stage))
    s, unit = scored(s, score, bias)
    if MASKED:
        s = gl.where(seen_in_tile(position, j, start, b, sizes, rules), s, HIDDEN / unit)
    return s


@gluon.jit
def _enough(most, score, top, BUCKETS: gl.constexpr):
    """The ``top``-th largest of the buckets' largest scores, (row, bucket), less a rounding, or if some are equal."""
    buckets = gl.max(most.reshape([most.shape[0], most.shape[1] // BUCKETS, BUCKETS]), 1)
    rows: gl.constexpr = gl.SliceLayout(1, most.type.layout)
    for _ in range(1, top):
        buckets = gl.where(buckets == gl.max(buckets, 1)[:, None], HIDDEN / 1e-6, buckets)
    unit = score.scale * LOG2E
    if (score.softcap is not None) or (score.bias is not None):
        unit = 1.0
    enough = gl.convert_layout(gl.max(buckets, 1), rows)
    return gl.maximum(enough - gl.abs(enough) * 1e-6, FLOOR / unit)


@gluon.jit
def _apart(s):
    """A tile (row, key) as (row, thread, 2, 2, ...): what a thread has of a row lies along the last axes."""
    s = s.reshape([s.shape[0], s.shape[1] // 8, 4, 2]).permute([0, 2, 1, 3])
    if s.shape[2] == 16:
        return s.reshape([s.shape[0], 4, 2, 2, 2, 2, 2])
    else:
        return s.reshape([s.shape[0], 4, 2, 2, 2, 2])


@gluon.jit
def _one(x, BN: gl.constexpr, STEP: gl.constexpr):
    """The first score of every thread and row (row, thread)."""
    if STEP < BN:
        x, _other = gl.split(x)
        return _one(x, BN, 8 if STEP == 1 else 2 * STEP)
    else:
        return x


@gluon.jit
def _address(place):
    """Of places: the lower half of their addresses, which tells those of a list apart."""
    return place.to(gl.int64).to(gl.int32)


@gluon.jit
def _append(x, key, enough, place, end, BN: gl.constexpr, STEP: gl.constexpr):
    """List the scores ``x``, of keys ``key`` and so on in steps of 1, 8, 16, ..., that are enough, from ``place`` on to
    where the list has its ``end``; the next place.

    Scores and keys take turns in a list, so that one address says where both are stored.
    """
    if STEP < BN:
        low, high = gl.split(x)
        NEXT: gl.constexpr = 8 if STEP == 1 else 2 * STEP
        place = _append(low, key, enough, place, end, BN, NEXT)
        return _append(high, key + STEP, enough, place, end, BN, NEXT)
    else:
        hit = (x >= enough) & (_address(place) != end)
        gl.store(place, x.to(gl.int32, bitcast=True), mask=hit)
        gl.store(place + 1, key, mask=hit)
        return gl.where(hit, place + 2, place)


@gluon.jit
def _reduce(
    group: gl.constexpr,
    smem,
    bars,
    lists,
    counts,
    given,
    row,
    lo,
    hi,
    BUCKETS: gl.constexpr,
    ROOM: gl.constexpr,
):
    """One group: the lists of 64 rows."""
    q_smem, k_smem = smem
    q_ready, ready, free = bars
    b, h, sizes, rules, score = given
    BN: gl.constexpr = k_smem.shape[3]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    first = row + group * GROUP_ROWS
    i, position = group_rows(first, sizes, rules, rows)
    mine, full_lo, full_hi, stop = group_keys(first, b, sizes, rules, lo, hi, BN)
    after = hi - mine - gl.cdiv(stop - mine, BN) * BN
    most = gl.full([GROUP_ROWS, BN], HIDDEN / 1e-6, gl.float32, mma)
    mbarrier.wait(q_ready.index(0), 0)
    q = q_smem.index(group).reshape([GROUP_ROWS, q_smem.shape[4]])
    n = skip(0, mine - lo, ready, free, BN)
    for part in gl.static_range(3):
        start, to = bounds(part, mine, full_lo, full_hi, stop)
        for at in range(start, to, BN):
            most = gl.maximum(most, _scores(n, at, q, smem, bars, position, given, part != 1))
            n += 1
    n = skip(n, after, ready, free, BN)

    enough = gl.where(i < sizes.rows, _enough(most, score, sizes.top, BUCKETS), float("inf"))
    leaf: gl.constexpr = _one(_apart(most), BN, 1).type.layout
    of_row: gl.constexpr = gl.SliceLayout(1, leaf)
    enough = gl.convert_layout(enough, of_row)[:, None]
    r = gl.arange(0, GROUP_ROWS, layout=of_row)
    thread = gl.arange(0, 4, layout=gl.SliceLayout(0, leaf))
    mine_of_all = (((b.to(gl.int64) * sizes.heads + h) * sizes.rows + first) + r)[:, None] * 4 + thread[None, :]
    place = lists + mine_of_all * (2 * ROOM)
    end = _address(place + 2 * ROOM)
    n = skip(n, mine - lo, ready, free, BN)
    for part in gl.static_range(3):
        start, to = bounds(part, mine, full_lo, full_hi, stop)
        for at in range(start, to, BN):
            s = _scores(n, at, q, smem, bars, position, given, part != 1)
            key = gl.zeros_like(end) + (at + 2 * thread)[None, :]
            place = _append(_apart(s), key, enough, place, end, BN, 1)
            n += 1
    skip(n, after, ready, free, BN)
    exists = (first + r < sizes.rows)[:, None] & (thread < 4)[None, :]
    gl.store(counts + mine_of_all, ROOM - (end - _address(place)) // 8, mask=exists)


@gluon.jit
def _kernel(
    q_at,
    k_at,
    lists,
    counts,
    sizes,
    rules,
    score,
    together,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    BUCKETS: gl.constexpr,
    ROOM: gl.constexpr,
):
    BN: gl.constexpr = k_at.block_type.shape[2]
    b, h, row, lo, hi = block_rows(together, GROUPS * GROUP_ROWS, sizes, rules, BN)
    given = (b, h, sizes, rules, score)
    smem = (buffers(q_at, GROUPS), buffers(k_at, STAGES))
    bars = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, GROUPS))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_reduce, (0, smem, bars, lists, counts, given, row, lo, hi, BUCKETS, ROOM)),
            (_reduce, (1, smem, bars, lists, counts, given, row, lo, hi, BUCKETS, ROOM)),
            (_reduce, (2, smem, bars, lists, counts, given, row, lo, hi, BUCKETS, ROOM)),
            (_fetch, ((q_at, k_at), smem, bars, (b, h, h // sizes.group, row), lo, hi)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )


def lists(q: Tensor, k: Tensor, room: Any, sizes: Any, rules: Any, score: Any) -> None:
    """Fill ``room`` (``triton.listed``); a list that is full may lack some keys."""
    pairs = q.shape[0] * sizes.heads
    together = taking_turns(pairs, k[0, 0].nbytes // sizes.group)
    grid = (triton.cdiv(sizes.rows, GROUPS.value * GROUP_ROWS.value) * pairs,)
    width = tile_width(q.shape[3])
    keys, stages = shape(width, 0)
    at = tiles(q, GROUP_ROWS.value, width), tiles(k, keys, width)
    places, buckets = room.found.shape[4], 64 if sizes.top <= 16 else keys
    options = {"STAGES": stages, "REGISTERS": 160, "BUCKETS": buckets, "ROOM": places}
    launch(_kernel, grid, q, *at, *room, sizes, rules, score, together, **options, num_warps=4)
