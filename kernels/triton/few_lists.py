"""The heaviest keys of one query a head (decoding), from the masses of all keys as ``few_columns`` computes them.

What inserts keys into lists while it reads them (``topk``) has its threads wait for each other at every key that is
inserted, about K (1 + ln(n / K)) times among n keys of a program. Masses take 4 bytes a key where the key itself took
256 (of 128 numbers in half precision, shared by the heads of a group), and a program that holds them sees all at once:

1. The masses of a span of keys lie in 128 buckets. No mass below the K-th largest of the buckets' maxima is among the
   K heaviest; 17 of a span in random order reach it for K = 16, and 37 for 32. Those are the span's list.
2. A list has room for 2 K. Where more reach it, masses are equal: the K heaviest are then found one by one.
3. The lists of all spans are read as one, which is such a span again if it is long, and put in order.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels.triton.device import launch

BUCKETS, WIDTH = 128, 16  # of a span
NOTHING = tl.constexpr(-1.0)  # in the place of a mass


@triton.jit
def _list_kernel(
    masses,
    names,
    listed,
    listed_names,
    length,
    K: tl.constexpr,
    ROOM: tl.constexpr,
    BUCKETS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of row and span of ``masses`` (row, place), with the keys ``names`` or by place, the list (row, span, ROOM).

    One warp, each thread of which holds whole buckets, places in steps of their number: it asks no other for a maximum.
    """
    row, bucket = tl.program_id(0).to(tl.int64), tl.arange(0, BUCKETS)
    at = tl.program_id(1) * (BUCKETS * WIDTH) + tl.arange(0, WIDTH)[:, None] * BUCKETS + bucket[None, :]
    p = tl.load(masses + row * length + at, mask=at < length, other=NOTHING)
    most = tl.max(p, 0)
    for _ in range(1, K):
        most = tl.where(most == tl.max(most, 0), NOTHING, most)  # equal ones at once: what is left is no larger
    hit = ((p >= tl.max(most, 0)) & (p > 0.0)).to(tl.int32)
    count = tl.sum(hit, 0)
    filled = tl.sum(count, 0)
    to = (row * tl.num_programs(1) + tl.program_id(1)) * ROOM
    slot = tl.arange(0, ROOM)
    if filled <= ROOM:
        place = (tl.cumsum(count, 0) - count)[None, :] + tl.cumsum(hit, 0) - 1
        name = at
        if names is not None:
            name = tl.load(names + row * length + at, mask=hit > 0, other=0)
        tl.store(listed + to + place, p, mask=hit > 0)
        tl.store(listed_names + to + place, name, mask=hit > 0)
        tl.store(listed + to + slot, NOTHING, mask=slot >= filled)
    else:
        for n in range(0, K):
            top = tl.max(tl.max(p, 1), 0)
            where = tl.min(tl.min(tl.where(p == top, at, 2147483647), 1), 0)
            name = where
            if names is not None:
                name = tl.load(names + row * length + where)
            tl.store(listed + to + n, top)
            tl.store(listed_names + to + n, name)
            p = tl.where(at == where, NOTHING, p)
        tl.store(listed + to + slot, NOTHING, mask=slot >= K)


@triton.jit
def _kernel(masses, names, mass, keys_at, length, top, key_offset, ALL: tl.constexpr):
    """The ``top`` heaviest of each row of ``masses`` (row, place), heaviest first."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, ALL)
    p = tl.load(masses + row * length + at, mask=at < length, other=NOTHING)
    for n in range(0, top):
        most, where = tl.max(p, 0, return_indices=True)
        name = where
        if names is not None:
            name = tl.load(names + row * length + where, mask=most > 0.0, other=0)
        tl.store(mass + row * top + n, tl.maximum(most, 0.0))
        tl.store(keys_at + row * top + n, tl.where(most > 0.0, name + key_offset, -1).to(tl.int64))
        p = tl.where(at == where, NOTHING, p)


def heaviest(masses: Tensor, count: int, key_offset: int) -> tuple[Tensor, Tensor]:
    """Masses (float32) and positions (int64), (..., count), of the heaviest keys of ``masses`` (..., key), contiguous.

    Where fewer have a mass, that is 0 and the position -1, as in ``topk.top_keys``.
    """
    shape, device = masses.shape[:-1], masses.device
    mass = torch.empty(*shape, count, dtype=torch.float32, device=device)
    keys_at = torch.empty(*shape, count, dtype=torch.int64, device=device)
    rows, length, size = shape.numel(), masses.shape[-1], 1 << (count - 1).bit_length()
    if rows == 0:
        return mass, keys_at
    names, room, span = None, max(8, 2 * size), BUCKETS * WIDTH
    tile = {"K": size, "ROOM": room, "BUCKETS": BUCKETS, "WIDTH": WIDTH}
    while length > span:
        spans = triton.cdiv(length, span)
        listed = torch.empty(rows, spans * room, dtype=torch.float32, device=device)
        named = torch.empty(listed.shape, dtype=torch.int32, device=device)
        launch(_list_kernel, (rows, spans), masses, masses, names, listed, named, length, **tile, num_warps=1)
        masses, names, length = listed, named, spans * room
    all_ = 1 << (length - 1).bit_length()
    launch(_kernel, (rows,), masses, masses, names, mass, keys_at, length, count, key_offset, ALL=all_, num_warps=8)
    return mass, keys_at
