"""From the pieces that forward passes leave to one Dataset of aligned, unpadded examples."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics import BLOCK, OUTPUT, ROW, KeyStatistic, Statistic
from headscope.interp.statistics.plan import Planned
from headscope.interp.tracing.builder import Builder
from headscope.interp.tracing.piece import Piece, Where
from headscope.interp.tracing.rooms import Rooms
from headscope.kernels.request import Request


class Answer(NamedTuple):
    """What alike calls of a pass are asked (None: nothing), and where that belongs."""

    planned: Planned
    session: Session
    where: Where
    asked: Request | None


class Session:
    """The forward passes of one batch of examples: a prompt, and whatever continued its cache."""

    def __init__(self, statistics: tuple[Statistic, ...], module: str, batch: int) -> None:
        self.statistics, self.module, self.batch = statistics, module, batch
        self._passes: list[list[Piece]] = []  # read when a record is asked for: generation makes many of little
        self._keys: dict[int, dict[str, dict[str, Tensor]]] = {}
        self._heads = 0
        self._outputs: dict[int, dict[str, Tensor]] = {}
        self._by_layer = any(isinstance(each, KeyStatistic) or each.kind == OUTPUT for each in statistics)
        self._read: int | None = None  # positions, by the layer that came furthest; None: no pass yet
        self._tokens: list[tuple[int, Tensor]] = []
        self._start: Tensor | None = None
        self._cross = False
        self.rooms = Rooms()
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

    def check(self, module: str, offset: int, cache: weakref.ref[Any] | None) -> None:
        """Refuse a call of ``module`` that does not fit this session; ``cache`` is what the pass continues or fills.

        Raises:
            HeadscopeError: another tower, another cache, or positions that do not follow.
        """
        if self.module != module:
            raise HeadscopeError(
                f"this model attends in several towers ({self.module} and {module}); choose one with tower=..."
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

    def add(self, pieces: list[Piece]) -> None:
        """Keep one pass's statistics, of calls of this session that stand at one place."""
        self._note(pieces[0].where)
        for piece in pieces if self._by_layer else ():
            self._merge(piece)
        if not self._by_layer or any(piece.values for piece in pieces):
            self._passes.append(pieces)

    def _merge(self, piece: Piece) -> None:
        """Take out of a piece what passes share: sums over queries, and outputs at chosen positions."""
        parts, piece.parts = piece.parts or {}, None  # as long as the text
        for statistic in self.statistics:
            if isinstance(statistic, KeyStatistic) and statistic.recorded[0] in parts:
                held = self._keys.setdefault(piece.layer, {}).setdefault(statistic.recorded[0], {})
                for part, value in parts[statistic.recorded[0]].items():
                    held[part] = _merged(statistic, part, held.get(part), value, piece.where.key_offset)
        if OUTPUT in piece.values:
            self._outputs.setdefault(piece.layer, {}).update(piece.values.pop(OUTPUT))

    def _of_kind(self, kind: str) -> dict[int, list[Piece]]:
        """Every layer's pieces with statistics of ``kind``, in the order of the passes."""
        found: dict[int, list[Piece]] = {}
        for piece in (piece for pieces in self._passes for piece in pieces):
            if kind in piece.values:
                found.setdefault(piece.layer, []).append(piece)
        return found

    def add_tokens(self, offset: int, ids: Tensor) -> None:
        """Keep a pass's input token ids (batch, query)."""
        self._tokens.append((offset, ids))

    def _note(self, where: Where) -> None:
        if self._read is not None and where.offset >= self._read:
            self.rooms.clear()  # a further pass: they are too short now
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
        rows, blocks = self._of_kind(ROW), self._of_kind(BLOCK)
        layers = sorted({*rows, *self._keys, *blocks, *self._outputs})
        if not layers or self._prompt_end is None:
            return None
        start = np.zeros(self.batch, dtype=np.int64) if self._start is None else self._start.cpu().numpy()
        length = self._end[max(self._end)] - start
        builder = Builder(self.statistics, layers, self.batch, start, length, self.rooms)
        builder.rows(rows)
        builder.keys(self._keys, self._heads, cross=self._cross)
        builder.blocks(blocks)
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
