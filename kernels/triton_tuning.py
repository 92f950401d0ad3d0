"""Tile sizes of the Triton kernels, by what a call computes, as ``benchmarks/h100.py --tune`` measured them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """Query rows and keys of a tile, and how Triton runs it."""

    rows: int
    keys: int
    warps: int
    stages: int


def row_tiles(d: int, d_value: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the row kernel for padded widths ``d`` and ``d_value`` (0: no output)."""
    wide = max(d, d_value)
    if dtype == torch.float32:  # exact float32 products run outside the tensor cores
        return Tiles(32, 32, 4, 2) if wide <= 128 else Tiles(16, 32, 4, 2)
    if d_value:
        return Tiles(128, 128, 8, 3) if wide <= 64 else Tiles(128, 64, 8, 3) if wide <= 128 else Tiles(64, 64, 8, 2)
    return Tiles(64, 128, 4, 3) if d <= 128 else Tiles(64, 64, 4, 2)


def decode_tiles(d: int, rows: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the row kernel where a program holds all ``rows`` queries of a key/value head."""
    if dtype == torch.float32:
        return Tiles(max(16, rows), 32, 4, 2)
    return Tiles(max(16, rows), 64 if d <= 128 else 32, 4, 3)


def column_tiles(d: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the column kernel: ``keys`` stay, ``rows`` stream."""
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 2) if d <= 128 else Tiles(16, 32, 4, 2)
    return Tiles(64, 128, 4, 3) if d <= 128 else Tiles(64, 64, 4, 2)


def key_splits(programs: int, keys: int, tile: int) -> int:
    """Over how many programs to split the keys so that about four a multiprocessor run."""
    return max(1, min(4 * 132 // max(1, programs), -(-keys // (4 * tile)), 256))
