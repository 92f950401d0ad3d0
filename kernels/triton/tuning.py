"""Tile sizes of the Triton kernels, by what a call computes, as ``benchmarks/gpu.py --tune`` measured them."""

from __future__ import annotations

from typing import NamedTuple

import torch

MOST_TOP = 32  # keys of a list of top keys
FEWEST_OF_ONE = 4096  # keys of one query, listed from their masses: with fewer, a launch less is quicker (a reckoning)
MOST_OF_ONE = 64  # heads that share a key/value head there, and their queries where columns are of few
SPLITS = (16, 64, 128)  # programs that share the keys of one row: at most so many, by how merging them is compiled


class Tiles(NamedTuple):
    """Query rows and keys of a tile, and how Triton runs it."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: bool = False  # the operand that stays: in registers, not in shared memory
    copy_engine: bool = True  # fetch tiles by Hopper's copy engine (where it can), not by the threads


def row_tiles(d: int, d_value: int, features: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the row kernel for padded widths ``d`` and ``d_value`` (0: no output), and ``features`` columns."""
    wide = max(d, d_value)
    if dtype == torch.float32:  # a product is three, of parts that lie beside each other in shared memory
        if wide > 128:
            return Tiles(16, 32, 4, 2)
        return Tiles(64, 32, 4, 2) if d_value and features else Tiles(128, 64, 8, 1)
    if wide > 128:
        return Tiles(64, 64, 8 if d_value else 4, 2)
    if d_value:
        return Tiles(128, 64, 4, 3, registers=True) if wide <= 64 else Tiles(128, 128, 8, 2)
    if d <= 64:
        return Tiles(64, 64, 4, 3)
    return Tiles(128, 64, 8, 3) if features else Tiles(128, 64, 8, 2)


def edited_row_tiles(d: int, d_value: int, features: int, dtype: torch.dtype, looks_up: bool) -> Tiles:
    """Tiles of the row kernel under a score edit; ``looks_up``: weights of distances, one look-up a pair."""
    wide = max(d, d_value)
    if dtype == torch.float32:
        return Tiles(64, 32, 4, 2) if looks_up and wide <= 128 else row_tiles(d, d_value, features, dtype)
    if looks_up:
        return Tiles(64, 64, 4 if wide <= 128 else 8, 2)
    if 64 < wide <= 128 and not features:
        return Tiles(64, 64, 4, 3)
    return Tiles(128, 64, 8, 3) if d_value and wide <= 64 else row_tiles(d, d_value, features, dtype)


def edited_column_tiles(d: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the column kernel under a score edit: fewer scores a thread, which also holds their weights."""
    return column_tiles(d, dtype) if d > 128 or dtype == torch.float32 else Tiles(64, 64, 4, 3)


def decode_tiles(d: int, rows: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the row kernel where a program holds all ``rows`` queries of a key/value head."""
    if dtype == torch.float32:
        return Tiles(max(16, rows), 32, 4, 2)
    return Tiles(max(16, rows), 64 if d <= 128 else 32, 4, 3)


def column_tiles(d: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the column kernel: ``keys`` stay, ``rows`` stream."""
    if dtype == torch.float32:
        if d > 128:
            return Tiles(16, 32, 4, 2)
        return Tiles(64, 64, 4, 2) if d <= 64 else Tiles(32, 64, 4, 2)
    if d <= 64:
        return Tiles(128, 64, 4, 3)
    return Tiles(128, 128, 4, 2, copy_engine=False) if d <= 128 else Tiles(64, 64, 4, 2)


def few_column_tiles(d: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the column kernel of few queries, which are one tile."""
    return Tiles(0, 64 if dtype == torch.float32 or d > 128 else 128, 4, 1)


def block_tiles(d: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the kernel of block maps, as wide as high."""
    if dtype == torch.float32:
        return Tiles(64, 64, 4, 2) if d <= 128 else Tiles(32, 32, 4, 2)
    return Tiles(128, 128, 4, 2) if d <= 128 else Tiles(64, 64, 4, 2)


def top_tiles(d: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the kernel of heaviest keys that walks twice; as many buckets as ``keys``."""
    if dtype == torch.float32:
        return Tiles(64, 64, 4, 2) if d <= 128 else Tiles(16, 32, 4, 2)
    return Tiles(64, 64, 4, 3) if d <= 128 else Tiles(64, 64, 4, 2)


def few_top_tiles(d: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the kernel of heaviest keys of few queries, which are one tile."""
    return Tiles(0, 32 if dtype == torch.float32 else 64, 4, 2)


def divergence_tiles(d: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the kernel of divergences, of which a program holds two."""
    if dtype == torch.float32:
        return Tiles(64, 32, 4, 2) if d <= 128 else Tiles(16, 32, 4, 2)
    return Tiles(64, 32, 4, 3) if d <= 128 else Tiles(128, 32, 8, 2)


def key_splits(programs: int, keys: int, tile: int) -> int:
    """Over how many programs, a power of two, to split the keys so that about four a multiprocessor run."""
    splits = max(1, min(4 * 132 // max(1, programs), -(-keys // (4 * tile)), SPLITS[-1]))
    return 1 << (splits.bit_length() - 1)
