"""Linear statistics on Hopper: a tile of features beside a tile of keys, and runs of tiles whose features are the same.

Where all keys of some tiles share the features c, the sums F of features and l of weights change alike: F - c l is only
scaled to the new maxima, and F' = a (F - c l) + c l'.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from headscope.kernels.hopper.device import GROUP_ROWS, scaled, tiles, total
from headscope.kernels.triton.features import runs


def feature_tiles(columns: Tensor | None, rows: int, *, asked: bool) -> tuple[Any, Any, int]:
    """Features (key, n) or (batch, key, n) as a kernel takes them: tiles; values and runs, where tiles are ``asked``
    for them; and 1 where every example has features of its own, else 0."""
    if columns is None:
        return None, None, 0
    batched = columns if columns.dim() == 3 else columns[None]
    found = (columns, runs(columns, rows)) if asked else None
    return tiles(batched, rows), found, int(batched.shape[0] > 1)


@gluon.jit
def no_features(NF: gl.constexpr):
    """Sums (row, column) of nothing yet, as the product with a tile of features adds to them."""
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NF, 16])
    return gl.zeros([GROUP_ROWS, NF], gl.float32, narrow)


@gluon.jit
def weigh(p, f, linear):
    """``linear`` and what the weights ``p`` (row, key) give it of a tile of features (1, key, column)."""
    f = f.reshape([f.shape[1], f.shape[2]])
    return warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, linear.type.layout, 2)), f, linear)


@gluon.jit
def of_example(columns, example, keys, BN: gl.constexpr, NF: gl.constexpr):
    """The features' rows and their ``runs`` of one example."""
    values, runs = columns
    return values + example.to(gl.int64) * keys * NF, runs + example * gl.cdiv(keys, BN)


@gluon.jit
def run_of(columns, start, to, linear, BN: gl.constexpr):
    """The run of tiles at ``start``: where it ends, negative where their features are mixed, and else the features."""
    values, runs = columns
    until = gl.load(runs + start // BN)
    column = gl.arange(0, linear.shape[1], layout=gl.SliceLayout(0, linear.type.layout))
    c = gl.load(values + start.to(gl.int64) * linear.shape[1] + column).to(gl.float32)
    return gl.where(until > 0, gl.minimum(until * BN, to), -gl.minimum(-until * BN, to)), c


@gluon.jit
def enter(linear, c, norm, FOLD: gl.constexpr):
    """F - c l, before tiles whose keys all have the features ``c``."""
    return linear - _beside(linear, norm, FOLD) * c[None, :]


@gluon.jit
def leave(linear, c, before, state, FOLD: gl.constexpr):
    """After them, from what ``enter`` gave when the maxima were ``before``: F."""
    linear = scaled(linear, gl.exp2(before - state[0]))
    return linear + _beside(linear, state[1], FOLD) * c[None, :]


@gluon.jit
def _beside(linear, norm, FOLD: gl.constexpr):
    rows: gl.constexpr = gl.SliceLayout(1, linear.type.layout)
    return total(norm, rows, FOLD)[:, None] if FOLD else gl.convert_layout(norm, rows)[:, None]
