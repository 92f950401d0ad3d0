"""The arrays of a record, from what forward passes left of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.records.lazy import missing
from headscope.interp.statistics import ROW, BlockStatistic, KeyStatistic, Statistic
from headscope.interp.tracing.blocks import BLOCKS
from headscope.interp.tracing.blocks import variables as block_variables
from headscope.interp.tracing.host_copies import in_host_memory
from headscope.interp.tracing.piece import Piece
from headscope.interp.tracing.rooms import Rooms, dtype_of


class Builder:
    """Scatters padded batches into arrays whose positions count from each example's first token."""

    def __init__(
        self,
        statistics: tuple[Statistic, ...],
        layers: list[int],
        batch: int,
        start: NDArray[np.int64],
        length: NDArray[np.int64],
        rooms: Rooms,
    ) -> None:
        self.statistics, self.layers, self.batch = statistics, layers, batch
        self.start, self.length, self.rooms = start, length, rooms
        self.variables: dict[str, Any] = {}
        self.coords: dict[str, Any] = {}
        self._kept: list[NDArray[np.int64]] | None = None

    def _extra(self, name: str) -> dict[str, list[Any]]:
        return next(s.axes for s in self.statistics if name in s.recorded)

    def rows(self, pieces: dict[int, list[Piece]]) -> None:
        """Row statistics to (example, layer, head, query, ...); ``query_position`` says which those are."""
        if not pieces:
            return
        passes = min(len(layer) for layer in pieces.values())  # an interrupted pass left some layers behind
        placed = next(iter(pieces.values()))[:passes]
        absolute = np.concatenate([piece.where.positions() for piece in placed])
        inside = [(absolute >= s) & (absolute < s + n) for s, n in zip(self.start, self.length, strict=True)]
        self._kept = [absolute[real] - s for real, s in zip(inside, self.start, strict=True)]
        width = max(len(kept) for kept in self._kept)
        position = np.full((self.batch, width), -1)
        for b, kept in enumerate(self._kept):
            position[b, : len(kept)] = kept
        self.coords["query"] = np.arange(width)
        self.coords["query_position"] = (("example", "query"), position)
        runs = [_run(np.flatnonzero(real)) for real in inside]
        for name in placed[0].values[ROW]:
            array: NDArray[Any] | None = None
            for i, layer in enumerate(self.layers):
                value = _joined([piece.values[ROW][name] for piece in pieces[layer][:passes]])
                if array is None:
                    array = self._room(name, value, [len(kept) for kept in self._kept])
                _place(array[:, i], value, runs)
            self._put(name, array, "query", *self._extra(name))

    def _room(self, name: str, like: Tensor, lengths: Sequence[int]) -> NDArray[Any]:
        """Room for (example, layer, head, place, ...) of values ``like`` a layer's: what an example does not fill is
        missing."""
        batch, heads, _, *rest = like.shape
        dtype = dtype_of(like)
        array = self.rooms.take(name, (batch, len(self.layers), heads, max(lengths), *rest), dtype)
        for b, length in enumerate(lengths):
            array[b, :, :, length:] = missing(dtype)
        return array

    def _put(self, name: str, array: NDArray[Any] | None, *dims: str) -> None:
        """Keep a variable of (example, layer, head, *dims)."""
        assert array is not None
        self.variables[name] = (("example", "layer", "head", *dims), array)
        self.coords["head"] = np.arange(array.shape[2])
        self.coords.update(self._extra(name))

    def keys(self, held: dict[int, dict[str, dict[str, Tensor]]], heads: int, *, cross: bool) -> None:
        """Column statistics to (example, layer, head, key, ...); all keys of cross-attention, another sequence's."""
        for statistic in self.statistics if held else ():
            if not isinstance(statistic, KeyStatistic):
                continue
            layers = [statistic.finish(held[layer][statistic.recorded[0]]) for layer in self.layers]
            for name in statistic.variables:
                values = in_host_memory([layer[name] for layer in layers])
                starts, lengths = self.start.tolist(), self.length.tolist()
                if cross:
                    starts, lengths = [0] * self.batch, [values[0].shape[2]] * self.batch
                like = values[0].expand(self.batch, heads, *values[0].shape[2:])
                array = self._room(statistic.named(name), like, lengths)
                runs = [slice(first, first + n) for first, n in zip(starts, lengths, strict=True)]
                for i, value in enumerate(values):
                    _place(array[:, i], value.expand(self.batch, heads, *value.shape[2:]), runs)
                self.coords["key"] = np.arange(max(lengths))
                self._put(statistic.named(name), array, "key", *statistic.axes)

    def blocks(self, pieces: dict[int, list[Piece]]) -> None:
        """Block statistics to (example, layer, head, query_block, ...)."""
        for statistic in self.statistics if pieces else ():
            if isinstance(statistic, BlockStatistic):
                held = {layer: pieces[layer] for layer in self.layers}
                made = block_variables(statistic, held, self.start, self.length)
                self.variables.update(made)
                for variable in made.values():
                    blocks = [dim for dim in map(statistic.named, BLOCKS) if dim in variable.sizes]
                    self.coords.update({dim: np.arange(variable.sizes[dim]) for dim in blocks})
                self.coords.update({"head": np.arange(variable.sizes["head"]), **statistic.axes})

    def outputs(self, held: dict[int, dict[str, Tensor]]) -> None:
        """Outputs at chosen positions to (example, layer, head, position, ..., d_head)."""
        for name in next(iter(held.values()), {}):
            stacked = torch.stack([held[layer][name].float().cpu() for layer in self.layers], dim=1)
            self._put(name, stacked.numpy(), *self._extra(name), "d_head")

    def tokens(self, held: list[tuple[int, Tensor]]) -> None:
        """Token ids of the recorded queries (example, query)."""
        if not held or self._kept is None:
            return
        width = max(offset + ids.shape[1] for offset, ids in held)
        whole = np.full((self.batch, width), -1, dtype=np.int64)
        for offset, ids in held:
            whole[:, offset : offset + ids.shape[1]] = ids.cpu().numpy()
        tokens = np.full((self.batch, max(len(kept) for kept in self._kept)), -1, dtype=np.int64)
        for b, kept in enumerate(self._kept):
            tokens[b, : len(kept)] = whole[b, kept + self.start[b]]
        self.variables["token"] = (("example", "query"), tokens)


def _joined(values: list[Tensor]) -> Tensor:
    """Statistics of passes in a row, in host memory; neighbours on one device are joined there."""
    grouped = [list(same) for _, same in groupby(values, key=lambda value: value.device)]
    parts = [(same[0] if len(same) == 1 else torch.cat(same, dim=2)).cpu() for same in grouped]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _run(places: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Ascending places as a slice where they are neighbours, which copies faster."""
    run = len(places) > 0 and places[-1] - places[0] + 1 == len(places)
    return slice(int(places[0]), int(places[-1]) + 1) if run else places


def _place(into: NDArray[Any], value: Tensor, runs: Sequence[slice | NDArray[np.int64]]) -> None:
    """Copy the places ``runs`` of every example of ``value`` (batch, head, place, ...), on torch's threads."""
    room = torch.from_numpy(into)
    alike = all(isinstance(run, slice) and run == runs[0] for run in runs)
    parts = [slice(None)] if alike else [slice(b, b + 1) for b in range(len(runs))]  # a large copy has more threads
    for part, run in zip(parts, runs, strict=False):
        some = value[part, :, run]
        room[part, :, : some.shape[2]].copy_(some)
