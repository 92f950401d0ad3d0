"""What the Hopper kernels share, in Gluon: tiles by the copy engine, the rules of a mask, the online softmax.

A tile in shared memory has two barriers: ``ready`` (the copy engine delivered it) and ``free`` (every group has read
it). The producer warp walks the tiles of a block and waits for ``free``; the groups walk the same tiles and wait for
``ready``. The n-th use of a barrier completes its phase n mod 2.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headscope.kernels.hopper.scores import key_bias, scored
from headscope.kernels.triton import masks as triton_masks
from headscope.kernels.triton import softmax as triton_softmax
from headscope.kernels.triton.device import FLOOR as _FLOOR
from headscope.kernels.triton.device import HIDDEN as _HIDDEN
from headscope.kernels.triton.device import LOG2E as _LOG2E

LOG2E, HIDDEN, FLOOR = (gl.constexpr(x.value) for x in (_LOG2E, _HIDDEN, _FLOOR))
CACHE = 32 << 20  # bytes, of the 50 MB that Hopper's second-level cache holds
GROUP_ROWS = gl.constexpr(64)  # rows of a warp group's tile: the height of Hopper's matrix instruction

# Triton's own functions, compiled as Gluon
row_positions = gluon.jit(triton_masks.row_positions.fn)
key_range = gluon.jit(triton_masks.key_range.fn)
query_range = gluon.jit(triton_masks.query_range.fn)
chunk_begin = gluon.jit(triton_masks.chunk_begin.fn)
segment_bound = gluon.jit(triton_masks.segment_bound.fn)
store_statistics = gluon.jit(triton_softmax.store_statistics.fn)

fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name before Triton 3.7


def tile_width(d: int) -> int:
    """The width of the tiles that hold heads ``d`` wide: of them, too, the copy engine fills up the rest with zeros."""
    return max(64, 1 << (d - 1).bit_length())


def tiles(x: Tensor, rows: int, width: int | None = None) -> Any:
    """A descriptor by which the copy engine fetches ``rows`` rows of ``x`` (..., position, d); zeros beyond its end."""
    shape = (*(1 for _ in x.shape[:-2]), rows, width or x.shape[-1])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(shape), _layout(shape, x.dtype))


def taking_turns(pairs: int, bytes_read: int) -> int:
    """Of how many pairs of example and head the blocks take turns, where those of one read ``bytes_read`` bytes.

    The last programs should be short ones, so that multiprocessors end together; what all read should stay in cache.
    """
    most = max(1, min(8, CACHE // bytes_read))
    return math.gcd(pairs, 1 << (most.bit_length() - 1))


@cache
def _layout(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for(list(shape), element)


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """``count`` barriers, each complete after ``arrivals`` arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(made.index(i), arrivals)
    return made


@gluon.jit
def buffers(at, count: gl.constexpr):
    """Room for ``count`` tiles of the descriptor ``at``."""
    return gl.allocate_shared_memory(at.dtype, [count] + at.block_type.shape, at.layout)


@gluon.jit
def take_turn(turn, group: gl.constexpr, n):
    """Wait until the group before this one has passed the matrix unit on for the n-th tile; the first group begins."""
    mbarrier.wait(turn.index(group), (n & 1) ^ (1 if group == 0 else 0))


@gluon.jit
def pass_turn(turn, group: gl.constexpr, GROUPS: gl.constexpr):
    """Let the next group have the matrix unit."""
    mbarrier.arrive(turn.index((group + 1) % GROUPS))


@gluon.jit
def place(blocks, heads, together):
    """Of this program: its block of ``blocks``, its example and its head; see ``taking_turns``."""
    chunk, rest = gl.program_id(0) // (blocks * together), gl.program_id(0) % (blocks * together)
    pair = chunk * together + rest % together
    return rest // together, pair // heads, pair % heads


@gluon.jit
def block_rows(together, ROWS: gl.constexpr, sizes, rules, BN: gl.constexpr):
    """Of this program's ``ROWS`` queries: their example, head and first row, and the keys ``lo:hi`` that they see.

    Blocks are counted from the last: under causal masks they are the longest, and go first.
    """
    blocks = gl.cdiv(sizes.rows, ROWS)
    block, b, h = place(blocks, sizes.heads, together)
    row = (blocks - 1 - block) * ROWS
    first = row_positions(row, rules)
    last = row_positions(gl.minimum(row + ROWS, sizes.rows) - 1, rules)
    lo, hi, _full_lo, _full_hi = key_range(first, last, b, sizes.keys, rules, BN)
    return b, h, row, lo, hi


@gluon.jit
def group_rows(first, sizes, rules, rows: gl.constexpr):
    """A group's rows from ``first``: their indices and positions."""
    i = first + gl.arange(0, GROUP_ROWS, layout=rows)
    return i, row_positions(gl.where(i < sizes.rows, i, 0), rules)


@gluon.jit
def group_keys(first, b, sizes, rules, lo, hi, BN: gl.constexpr):
    """The part of ``lo:hi`` that a group's rows from ``first`` see, and that of whole tiles which they all see."""
    begin = row_positions(gl.minimum(first, sizes.rows - 1), rules)
    end = row_positions(gl.minimum(first + GROUP_ROWS - 1, sizes.rows - 1), rules)
    mine, stop, full_lo, full_hi = key_range(begin, end, b, sizes.keys, rules, BN)
    lo = gl.maximum(lo, mine)
    hi = gl.maximum(gl.minimum(hi, stop), lo)
    full_lo = gl.minimum(gl.maximum(full_lo, lo), hi)
    return lo, full_lo, gl.maximum(gl.minimum(full_hi, hi // BN * BN), full_lo), hi


@gluon.jit
def bounds(part: gl.constexpr, lo, full_lo, full_hi, hi):
    """The tiles of a part: 0 before the whole ones, 1 the whole ones, 2 after them."""
    if part == 0:
        return lo, full_lo
    elif part == 1:
        return full_lo, full_hi
    else:
        return full_hi, hi


@gluon.jit
def skip(n, keys, ready, free, BN: gl.constexpr):
    """Pass on the tiles of ``keys`` keys that a group does not see, from the n-th: the next n."""
    STAGES: gl.constexpr = ready.shape[0]
    for passed in range(0, keys, BN):
        at = n + passed // BN
        mbarrier.wait(ready.index(at % STAGES), at // STAGES & 1)
        mbarrier.arrive(free.index(at % STAGES))
    return n + gl.cdiv(gl.maximum(keys, 0), BN)


@gluon.jit
def fold(x, FOLD: gl.constexpr):
    """Sums over the keys of a tile (row, key): (row,), or (row, 4) that each thread keeps to itself until the end."""
    if FOLD:
        return gl.sum(gl.sum(x.reshape([x.shape[0], x.shape[1] // 8, 4, 2]), 1), 2)
    else:
        return gl.sum(x, 1)


@gluon.jit
def spread(x, like: gl.constexpr, FOLD: gl.constexpr):
    """A row's number beside its sums as ``fold`` keeps them."""
    if FOLD:
        return gl.convert_layout(x, gl.SliceLayout(1, like))[:, None]
    else:
        return x


@gluon.jit
def total(x, rows: gl.constexpr, FOLD: gl.constexpr):
    """A row's sum from what ``fold`` kept."""
    if FOLD:
        return gl.convert_layout(gl.sum(x, 1), rows)
    else:
        return x


@gluon.jit
def seen_in_tile(position, j, start, b, sizes, rules):
    """Which keys ``start + j`` rows at ``position`` see: (row, key). A rule is a bound that each row has.

    A score is compared with its row's bounds and nothing else, where ``visible`` asks every rule of every pair.
    """
    stop = gl.zeros_like(position) + sizes.keys
    if rules.right is not None:
        stop = gl.minimum(stop, position + (rules.right + 1 - rules.key_offset))
    if rules.end is not None:
        stop = gl.minimum(stop, gl.load(rules.end + b).to(gl.int32) - rules.key_offset)
    if rules.chunk is not None:
        chunk = chunk_begin(position, b, rules) - rules.key_offset
        stop = gl.minimum(stop, chunk + rules.chunk)
    if rules.begins is not None:
        stop = gl.minimum(stop, segment_bound(rules.ends, position, b, rules) - rules.key_offset)
    seen = j[None, :] < (stop - start)[:, None]
    one_end: gl.constexpr = rules.left is None and rules.start is None and rules.chunk is None and rules.begins is None
    if not one_end:
        first = gl.zeros_like(position)
        if rules.chunk is not None:
            first = gl.maximum(first, chunk)
        if rules.begins is not None:
            first = gl.maximum(first, segment_bound(rules.begins, position, b, rules) - rules.key_offset)
        if rules.left is not None:
            first = gl.maximum(first, position - (rules.left + rules.key_offset))
        if rules.start is not None:
            first = gl.maximum(first, gl.load(rules.start + b).to(gl.int32) - rules.key_offset)
        seen = seen & (j[None, :] >= (first - start)[:, None])
    return seen


@gluon.jit
def absorb(s, state, position, start, b, h, sizes, rules, results, score, FOLD: gl.constexpr, MASKED: gl.constexpr):
    """Steps 1 to 4 of ``triton_rows`` on products ``s``: (weights p, factor of what was summed before, state)."""
    m, norm, e, x = state
    keys: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    like: gl.constexpr = norm.type.layout
    j = gl.arange(0, s.shape[1], layout=keys)
    s, unit = scored(s, score, key_bias(score, b, h, start, j, sizes.keys, MASKED))
    if MASKED:
        s = gl.where(seen_in_tile(position, j, start, b, sizes, rules), s, HIDDEN / unit)
    new = gl.maximum(m, gl.max(s, 1) * unit)
    t = s * unit - new[:, None]
    p = gl.exp2(t)
    a = gl.exp2(m - new)
    part, a_ = fold(p, FOLD), spread(a, like, FOLD)
    if results.entropy is not None:
        e = a_ * (e + norm * spread(m - new, like, FOLD)) + fold(p * t, FOLD)
    if results.distance is not None:
        gap = spread((position - (start + rules.key_offset)).to(gl.float32), like, FOLD)
        x = a_ * x + gap * part - fold(p * j.to(gl.float32)[None, :], FOLD)
    return p, a, (new, a_ * norm + part, e, x)


@gluon.jit
def scaled(x, a):
    """``x`` (row, column) times ``a`` (row,)."""
    return x * gl.convert_layout(a, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def finish(i, state, linear, results, sizes, sinks, b, h, FOLD: gl.constexpr):
    """Step 6 of ``triton_rows``: store the rows' statistics; returns what the output is multiplied by."""
    m, norm, e, x = state
    rows: gl.constexpr = m.type.layout
    norm = total(norm, rows, FOLD)
    e, x = total(e, rows, FOLD), total(x, rows, FOLD)
    exists = i < sizes.rows
    row = (b.to(gl.int64) * sizes.heads + h) * sizes.rows + i
    inverse = store_statistics(results, row, exists, m, norm, e, x, sinks, h)
    if results.linear is not None:
        store_rows(results.linear, linear, row, inverse, exists, sizes.width)
    return row, inverse, exists


@gluon.jit
def store_rows(pointer, values, row, factor, exists, width):
    """Store ``width`` columns of ``values`` (row, column) times ``factor`` (row,) as rows ``row`` of a tensor."""
    rows: gl.constexpr = gl.SliceLayout(1, values.type.layout)
    column = gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, values.type.layout))
    values = (values * gl.convert_layout(factor, rows)[:, None]).to(pointer.dtype.element_ty)
    at = gl.convert_layout(row, rows)[:, None] * width + column[None, :]
    gl.store(pointer + at, values, mask=gl.convert_layout(exists, rows)[:, None] & (column < width)[None, :])
