"""From the pieces that forward passes leave to one Dataset of aligned, unpadded examples."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.records.lazy import missing
from headscope.interp.statistics import BLOCK, OUTPUT, ROW, BlockStatistic, KeyStatistic, Statistic
from headscope.interp.tracing.blocks import BLOCKS
from headscope.interp.tracing.blocks import variables as block_variables
from headscope.interp.tracing.host_copies import in_host_memory
from headscope.interp.tracing.piece import Piece, Where


class Session:
    """The forward passes of one batch of examples: a prompt, and whatever continued its cache."""

    def __init__(self, statistics: tuple[Statistic, ...], module: str, batch: int) -> None:
        self.statistics, self.module, self.batch = statistics, module, batch
        self._pieces: dict[int, list[Piece]] = {}
        self._keys: dict[int, dict[str, dict[str, Tensor]]] = {}
        self._heads = 0
        self._blocks: dict[int, list[Piece]] = {}
        self._outputs: dict[int, dict[str, Tensor]] = {}
        self._read: int | None = None  # positions, by the layer that came furthest; None: no pass yet
        self._where: Where | None = None  # of the piece before
        self._tokens: list[tuple[int, Tensor]] = []
        self._start: Tensor | None = None
        self._cross = False
        self._end: dict[int, NDArray[np.int64]] = {}
        self._prompt_end: NDArray[np.int64] | None = None
        self._cache: weakref.ref[Any] | None = None
        self._began: int | None = None

    @property
    def continues(self) -> bool:
        """Whether a pass came before the present one."""
        return self._read is not None

    def is_over(self, call: AttentionCall, offset: int, cache: weakref.ref[Any] | None) -> bool:
        """Whether ``call`` begins new examples: it starts again at position 0, or where this session began but on
        another cache (each a copy of one prefix, or a prefix that was tuned), or the batch changed."""
        if self._read is None:
            return False
        other = cache is not None and (self._cache is None or self._cache() is not cache())
        return offset == 0 or call.query.shape[0] != self.batch or (other and offset == self._began)

    def is_prompt(self, call: AttentionCall, offset: int, boundary: int | None) -> bool:
        """Whether ``call`` reads the prompt: before the ``boundary`` that `generate` named; without one, in the first
        pass, or in a later one of several tokens (chunked)."""
        if boundary is not None:
            return offset < boundary
        return self._read is None or call.query.shape[2] > 1

    def check(self, call: AttentionCall, offset: int, cache: weakref.ref[Any] | None) -> None:
        """Refuse a call that does not fit the others of this session; ``cache`` is what the pass continues or fills.

        Raises:
            HeadscopeError: another tower, another cache, or positions that do not follow.
        """
        if self.module != call.module:
            raise HeadscopeError(
                f"this model attends in several towers ({self.module} and {call.module}); choose one with tower=..."
            )
        self._began = offset if self._began is None else self._began
        read = offset if self._read is None else self._read
        if offset != read:
            raise HeadscopeError(
                f"a pass at position {offset} does not follow the {read} positions that were recorded (a cropped, "
                "shared or foreign cache); trace each prompt from its start, one after the other"
            )
        if self._cache is not None and cache is not None and self._cache() is not cache():
            raise HeadscopeError(
                "a pass continues another cache than the pass before it, so examples would be mixed; trace each "
                "prompt from its start, one after the other"
            )
        self._cache = self._cache or cache

    def add(self, piece: Piece) -> None:
        """Keep one call's statistics by kind."""
        if piece.where is not self._where:
            self._note(piece.where)
        for kind, held_pieces in ((ROW, self._pieces), (BLOCK, self._blocks)):
            if kind in piece.values:
                held_pieces.setdefault(piece.layer, []).append(piece)
        for statistic in self.statistics if piece.parts else ():
            if isinstance(statistic, KeyStatistic) and statistic.recorded[0] in piece.parts:
                held = self._keys.setdefault(piece.layer, {}).setdefault(statistic.recorded[0], {})
                for part, value in piece.parts[statistic.recorded[0]].items():
                    held[part] = _merged(statistic, part, held.get(part), value, piece.where.key_offset)
        if OUTPUT in piece.values:
            self._outputs.setdefault(piece.layer, {}).update(piece.values[OUTPUT])

    def add_tokens(self, offset: int, ids: Tensor) -> None:
        """Keep a pass's input token ids (batch, query)."""
        self._tokens.append((offset, ids))

    def _note(self, where: Where) -> None:
        self._where = where
        stop = where.offset + where.shape[2]
        self._read = max(self._read or 0, stop)
        self._cross, self._heads = where.cross, where.shape[1]
        if where.start is not None:  # the latest: a chunk of padding alone does not know where its example begins
            self._start = where.start
        if stop not in self._end:
            whole = np.full(self.batch, stop)
            self._end[stop] = whole if where.end is None else np.minimum(where.end.cpu().numpy(), stop)
            if where.prompt or self._prompt_end is None:
                self._prompt_end = self._end[stop]

    def dataset(self) -> xr.Dataset | None:
        """The session as a Dataset, or None if no layer recorded anything."""
        layers = sorted({*self._pieces, *self._keys, *self._blocks, *self._outputs})
        if not layers or self._prompt_end is None:
            return None
        start = np.zeros(self.batch, dtype=np.int64) if self._start is None else self._start.cpu().numpy()
        length = self._end[max(self._end)] - start
        builder = _Builder(self.statistics, layers, self.batch, start, length)
        builder.rows(self._pieces)
        builder.keys(self._keys, self._heads, cross=self._cross)
        builder.blocks(self._blocks)
        builder.outputs(self._outputs)
        builder.tokens(self._tokens)
        coords: dict[str, Any] = {
            "example": np.arange(self.batch),
            "layer": np.asarray(layers),
            "length": ("example", length),
            "prompt_length": ("example", self._prompt_end - start),
        }
        return xr.Dataset(builder.variables, {**coords, **builder.coords}, attrs={"module": self.module})


def _merged(statistic: KeyStatistic, part: str, held: Tensor | None, value: Tensor, offset: int) -> Tensor:
    """``held`` and what a pass gave of its keys from position ``offset``: keys are absolute positions from 0."""
    width = max(offset + value.shape[2], 0 if held is None else held.shape[2])
    value = _placed(value, offset, width, statistic.empty)
    return value if held is None else statistic.merge(part, _placed(held, 0, width, statistic.empty), value)


def _placed(value: Tensor, offset: int, width: int, empty: float) -> Tensor:
    """``value`` (batch, head, key, ...) as the keys from ``offset`` of ``width``."""
    if (offset, width) == (0, value.shape[2]):
        return value
    whole = value.new_full((*value.shape[:2], width, *value.shape[3:]), empty)
    whole[:, :, offset : offset + value.shape[2]] = value
    return whole


class _Builder:
    """Scatters padded batches into arrays whose positions count from each example's first token."""

    def __init__(
        self,
        statistics: tuple[Statistic, ...],
        layers: list[int],
        batch: int,
        start: NDArray[np.int64],
        length: NDArray[np.int64],
    ) -> None:
        self.statistics, self.layers, self.batch = statistics, layers, batch
        self.start, self.length = start, length
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
                    array = self._room(value, [len(kept) for kept in self._kept])
                _place(array[:, i], value, runs)
            self._put(name, array, "query", *self._extra(name))

    def _room(self, like: Tensor, lengths: Sequence[int]) -> NDArray[Any]:
        """Room for (example, layer, head, place, ...) of values ``like`` a layer's: what an example does not fill is
        missing."""
        batch, heads, _, *rest = like.shape
        dtype = like.new_empty(0, device="cpu").numpy().dtype
        array: NDArray[Any] = np.empty((batch, len(self.layers), heads, max(lengths), *rest), dtype)
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
                array = self._room(values[0].expand(self.batch, heads, *values[0].shape[2:]), lengths)
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
