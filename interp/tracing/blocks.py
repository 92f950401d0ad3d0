"""Block statistics of the passes over a text, as arrays over its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.statistics import BLOCK, BlockStatistic
from headscope.interp.tracing.piece import Piece

BLOCKS = ("query_block", "key_block")


def variables(
    statistic: BlockStatistic,
    pieces: Mapping[int, Sequence[Piece]],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> dict[str, xr.Variable]:
    """What ``statistic`` writes: (example, layer, head, *dims) from every layer's pieces.

    ``starts`` and ``lengths`` are of the texts; their first tokens may have been read before the trace began.
    """
    first_read = np.maximum(next(iter(pieces.values()))[0].where.offset - starts, 0)
    passes = min(len(layer) for layer in pieces.values())  # an interrupted pass left some layers behind
    made = {}
    for name, dims in statistic.dims.items():
        found = [_values(layer[:passes], statistic.recorded[0], statistic.named(name)) for layer in pieces.values()]
        sizes = [max(at.stop for at in side) for side in zip(*(at for layer in found for at, _ in layer), strict=True)]
        first = found[0][0][1]
        array: NDArray[Any] = np.zeros((first.shape[0], len(found), first.shape[1], *sizes), first.dtype)
        for i, layer in enumerate(found):
            for at, value in layer:
                held = array[:, i][(slice(None), slice(None), *at)]
                held[...] = statistic.merge(held, value)
        ends = zip(array, first_read.tolist(), lengths.tolist(), strict=True)
        whole = np.stack([statistic.finish(name, one, start, stop) for one, start, stop in ends])
        own = (statistic.named(dim) for dim in dims)
        made[statistic.named(name)] = xr.Variable(("example", "layer", "head", *own), whole, statistic.attributes)
    return made


def _values(pieces: Sequence[Piece], statistic: str, name: str) -> list[tuple[tuple[slice, ...], NDArray[Any]]]:
    """One layer's values, each with its place along the blocks."""
    found = []
    for piece in pieces:
        value = piece.values[BLOCK][name].cpu().numpy()
        assert piece.places is not None
        place = piece.places[statistic]
        found.append((tuple(slice(at, at + n) for at, n in zip(place, value.shape[2:], strict=False)), value))
    return found
