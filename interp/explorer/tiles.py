"""Tiles of a head's pattern at any zoom, computed when they are looked at.

Level L pools 2**L x 2**L weights to one cell; level 0 is the pattern itself. A tile is ``SIDE`` x ``SIDE`` cells.
``"mass"`` is the share of the block's queries' attention that falls on its keys (the mean of the block's weights is
that over its number of keys), ``"max"`` the largest weight (``headscope.kernels.blocks``). Hidden cells are NaN.

A tile over more weights than ``work`` allows is first made from some of its rows, evenly spread: each of those rows is
exact, their mean is an estimate of the block's (with ``max``: at least so much). It says of how many rows it is, and
``finer`` takes in more until it is exact: so no single tile takes long, at any length [OURS].
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.explorer.kept import KeptLayer
from headscope.kernels.blocks import blocks

SIDE = 128
WORK = {"cpu": 1 << 23}  # weights at a time: some 0.1 s of one core
GPU_WORK = 1 << 35
HELD = 64  # unfinished tiles
Pool = Literal["mass", "max"]


def top_level(tokens: int) -> int:
    """The level at which one tile holds the whole map."""
    level = 0
    while -(-tokens // (1 << level)) > SIDE:
        level += 1
    return level


@dataclass(frozen=True)
class Place:
    """A tile of a map: ``level``, and which in the grid of that level's tiles (row ``i``, column ``j``)."""

    level: int
    i: int
    j: int

    def spans(self, queries: int, keys: int) -> tuple[slice, slice]:
        """Its query rows and keys, cut off at the ends of the text."""
        width = SIDE << self.level
        rows = slice(min(self.i * width, queries), min((self.i + 1) * width, queries))
        return rows, slice(min(self.j * width, keys), min((self.j + 1) * width, keys))


@dataclass(eq=False)
class Tile:
    """``cells`` (SIDE, SIDE) float32, NaN where nothing is to be seen; ``rows`` of ``of`` rows of each block are in."""

    cells: NDArray[np.float32]
    rows: int = 1
    of: int = 1

    @property
    def exact(self) -> bool:
        """Whether every row is in."""
        return self.rows >= self.of


@dataclass(eq=False)
class _Started:
    """A tile in the making: sums (or maxima) over the rows that are in, and how many those are, by row of cells."""

    sums: Tensor
    count: Tensor
    stride: int
    done: int = 0


@dataclass(eq=False)
class Tiles:
    """The tiles of one run's layers; ``work``: weights at a time, by default ``WORK``."""

    layers: dict[int, KeptLayer]
    work: int | None = None
    _started: OrderedDict[tuple[int, int, Pool, Place], _Started] = field(default_factory=OrderedDict)

    def tile(self, layer: int, head: int, place: Place, pool: Pool = "mass", *, finer: bool = False) -> Tile:
        """One tile of one head; ``finer``: with more of its rows than before, where it is not exact yet."""
        kept = self.layers[layer]
        rows, keys = place.spans(kept.queries, kept.keys)
        low, high = kept.bounds(rows.start, rows.stop) if rows.start < rows.stop else (0, 0)
        seen = slice(max(keys.start, low), min(keys.stop, high))
        if rows.start >= rows.stop or seen.start >= seen.stop:
            return Tile(np.full((SIDE, SIDE), np.nan, np.float32))
        if place.level == 0:
            return Tile(_exact(kept, head, rows, keys))
        width, device = 1 << place.level, kept.call.query.device
        pairs = (rows.stop - rows.start) * (seen.stop - seen.start)
        work = self.work or WORK.get(device.type, GPU_WORK)
        stride = 1
        while pairs > work * stride and stride < width:
            stride *= 2
        if stride == 1 and kept.call.redistribution is None:
            cells = _pooled(kept, head, rows, keys, width, pool)
            return Tile(_laid(kept, cells, place, rows))
        key = (layer, head, pool, place)
        started = self._started.pop(key, None) or self._start(rows, keys, width, stride, device)
        self._started[key] = started
        while len(self._started) > HELD:
            self._started.popitem(last=False)
        if started.done == 0 or (finer and started.done < started.stride):
            _add(kept, head, rows, keys, seen, started, width, pool)
        cells = started.sums if pool == "max" else started.sums / started.count.clamp(min=1)[:, None]
        done, per = started.done, width // started.stride
        return Tile(_laid(kept, cells, place, rows), done * per, width)

    @staticmethod
    def _start(rows: slice, keys: slice, width: int, stride: int, device: torch.device) -> _Started:
        down, across = -(-(rows.stop - rows.start) // width), -(-(keys.stop - keys.start) // width)
        return _Started(torch.zeros(down, across, device=device), torch.zeros(down, device=device), stride)


def _exact(kept: KeptLayer, head: int, rows: slice, keys: slice) -> NDArray[np.float32]:
    at = torch.arange(rows.start, rows.stop, device=kept.call.query.device)
    weights = kept.weights(at, keys, head)[0].float()
    hidden = kept.hidden(at, keys, head)
    if hidden is not None:
        weights = weights.masked_fill(hidden, torch.nan)
    return _filled(weights)


def _pooled(kept: KeptLayer, head: int, rows: slice, keys: slice, width: int, pool: Pool) -> Tensor:
    """The whole tile at once, by the kernels."""
    part = kept.head(head).rows(rows).keys(keys)
    lse = kept.lse_of(torch.arange(rows.start, rows.stop, device=part.q.device), head)[None]
    return blocks(part, size=width, pool="max" if pool == "max" else "mean", lse=lse)[0, 0]


def _add(
    kept: KeptLayer, head: int, rows: slice, keys: slice, seen: slice, started: _Started, width: int, pool: Pool
) -> None:
    """Take in the next rows: one of every ``stride``, in an order that keeps them evenly spread."""
    stride, device = started.stride, started.sums.device
    offset = int(f"{started.done:0{stride.bit_length() - 1}b}"[::-1], 2) if stride > 1 else 0
    offset = (offset + stride // 2) % stride  # the first lie in the middle
    at = torch.arange(rows.start + offset, rows.stop, stride, device=device)
    started.done += 1
    if not at.numel():
        return
    first = (seen.start - keys.start) // width
    begin = keys.start + first * width
    for part in torch.split(at, max(1, (1 << 21) // (seen.stop - begin))):  # a tile's worth of memory at a time
        weights = kept.weights(part, slice(begin, seen.stop), head)[0].float()
        cells = torch.nn.functional.pad(weights, (0, -weights.shape[1] % width)).view(len(part), -1, width)
        cells = cells.amax(2) if pool == "max" else cells.sum(2)
        block = (part - rows.start) // width
        there = started.sums[:, first : first + cells.shape[1]]
        if pool == "max":
            there.scatter_reduce_(0, block[:, None].expand_as(cells), cells, "amax")
        else:
            there.index_add_(0, block, cells)
        started.count.index_add_(0, block, torch.ones_like(block, dtype=started.count.dtype))


def _laid(kept: KeptLayer, cells: Tensor, place: Place, rows: slice) -> NDArray[np.float32]:
    """Cells as a whole tile, those that no row of theirs sees NaN."""
    width = 1 << place.level
    found = _filled(cells)
    at = (place.j * SIDE + np.arange(SIDE)) * width
    for r in range(cells.shape[0]):
        first = rows.start + r * width
        low, high = kept.bounds(first, min(first + width, rows.stop))
        found[r, (at >= high) | (at + width <= low)] = np.nan
    return found


def _filled(cells: Tensor) -> NDArray[np.float32]:
    found = np.full((SIDE, SIDE), np.nan, np.float32)
    found[: cells.shape[0], : cells.shape[1]] = cells.cpu().numpy()
    return found
