"""Statistics with one value a block of queries and keys: maps of a head at any length.

Blocks are counted from each example's first token. A pass may hold some rows of a text only, so what it gives begins at
a ``place``: the first block among its examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.parts import cut
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.base import BLOCK, GAPS, CallStatistic, Kind, Plan, Reader
from headscope.interp.statistics.spans import OPEN
from headscope.kernels import blocks
from headscope.kernels.request import Reduced, Request
from headscope.kernels.scores import Scores


@dataclass(frozen=True)
class BlockStatistic(CallStatistic):
    """Base of the statistics of blocks of ``size`` tokens; ``measure`` gives (batch, head, block, ...)."""

    size: int = 64
    kind: ClassVar[Kind] = BLOCK
    refused: ClassVar[Mapping[str, str]] = {
        **GAPS,
        "cross-attention": "blocks of queries and keys count in one sequence",
    }
    dims: ClassVar[dict[str, tuple[str, ...]]] = {}  # of every variable, after example, layer and head

    counts: ClassVar[tuple[str, ...]] = ("size",)

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the record variables this statistic writes."""
        return tuple(self.dims)

    @property
    def shared(self) -> dict[str, Any]:
        return {**self.coordinates, "block": self.size}

    @property
    def attributes(self) -> dict[str, Any]:
        """What its variables must be read with."""
        return {"block": self.size}

    def place(self, call: AttentionCall) -> tuple[int, int]:
        """The first query block and the first index along the second of ``dims``."""
        raise NotImplementedError

    def merge(self, held: NDArray[Any], value: NDArray[Any]) -> NDArray[Any]:
        """What a place of the record holds, 0 at first, after another pass gave ``value`` for it."""
        added: NDArray[Any] = held + value
        return added

    def finish(self, name: str, array: NDArray[Any], first: int, stop: int) -> NDArray[Any]:
        """What is recorded of one example whose queries ``first:stop`` gave the merged ``array`` (..., *dims)."""
        raise NotImplementedError

    def bytes_a_head(self, tokens: int) -> int:
        """The size of what is recorded of a text."""
        raise NotImplementedError


@dataclass(frozen=True)
class BlockMap(BlockStatistic):
    """The pattern pooled to blocks of ``size`` x ``size`` tokens: (example, layer, head, query_block, key_block).

    ``pool``: ``"mean"`` over a block's queries of their mass on its keys, so that a row of blocks sums to 1 (less with
    a sink logit); their ``"sum"``; or ``"max"``, the largest single weight. A map of n blocks takes 4 n^2 bytes a head.
    """

    pool: blocks.Pool = "mean"
    name: ClassVar[str] = "block_map"
    unit: ClassVar[str] = "mass"
    dims: ClassVar[dict[str, tuple[str, ...]]] = {"block_map": ("query_block", "key_block")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in ("mean", "sum", "max"):
            raise HeadscopeError(f"BlockMap pools by 'mean', 'sum' or 'max', not {self.pool!r}")

    @property
    def attributes(self) -> dict[str, Any]:
        return {"block": self.size, "pool": self.pool}

    def place(self, call: AttentionCall) -> tuple[int, int]:
        """The first query block and the first key block."""
        found = [(text.query // self.size, text.key // self.size) for text in texts(call)] or [(0, 0)]
        return min(i for i, _ in found), min(j for _, j in found)

    def ask(self, plan: Plan) -> Reader:
        """Ask for the lse, from which blocks follow."""
        plan.flag("lse")
        return super().ask(plan)

    def measure(self, call: AttentionCall, reduced: Reduced, rows: Tensor | None) -> dict[str, Tensor]:
        """The blocks of a pass; sums, also where the record holds their means."""
        lse = reduced.lse if rows is None else None
        i, j = self.place(call)
        pool: blocks.Pool = "max" if self.pool == "max" else "sum"
        found = []
        for text in texts(call):
            part = cut(call, text.examples, text.rows, text.keys)
            norm = _lse(part) if lse is None else lse[text.examples, :, text.rows]
            before = text.query % self.size  # rows of the first block, in an earlier pass
            norm = pad(norm, (before, 0), value=torch.inf)
            values = blocks.blocks(_behind(part, before, text.key % self.size), size=self.size, pool=pool, lse=norm)
            found.append((text.examples, (text.query // self.size - i, text.key // self.size - j), values))
        return {self.name: _together(call, found)}

    def merge(self, held: NDArray[Any], value: NDArray[Any]) -> NDArray[Any]:
        """Passes over one block add up, or the heaviest counts."""
        return np.maximum(held, value) if self.pool == "max" else super().merge(held, value)

    def finish(self, name: str, array: NDArray[Any], first: int, stop: int) -> NDArray[Any]:
        """Means where they are wanted; nothing of blocks without a query, and of keys beyond the end of the text."""
        queries = _tokens(stop, self.size, array.shape[-2]) - _tokens(first, self.size, array.shape[-2])
        found = array / np.maximum(queries, 1)[:, None].astype(array.dtype) if self.pool == "mean" else array
        beyond = _tokens(stop, self.size, array.shape[-1]) == 0
        return np.where((queries == 0)[:, None] | beyond, np.nan, found)

    def bytes_a_head(self, tokens: int) -> int:
        """One float a pair of blocks."""
        return 4 * (-(-tokens // self.size)) ** 2


@dataclass(frozen=True)
class TopBlocks(BlockStatistic):
    """The ``k`` heaviest key blocks of every query block: memory linear in length.

    ``top_blocks`` (example, layer, head, query_block, block_rank): which, heaviest first, -1 for none;
    ``top_block_mass``: their share of the query block's attention; ``residual_mass`` (example, layer, head,
    query_block): that of all other blocks, exactly. A pass must begin at a multiple of ``size``.
    """

    k: int = 16
    name: ClassVar[str] = "top_blocks"
    counts: ClassVar[tuple[str, ...]] = ("size", "k")
    unit: ClassVar[str] = "block of keys"
    units: ClassVar[Mapping[str, str]] = {"top_block_mass": "mass", "residual_mass": "mass"}
    dims: ClassVar[dict[str, tuple[str, ...]]] = {
        "top_blocks": ("query_block", "block_rank"),
        "top_block_mass": ("query_block", "block_rank"),
        "residual_mass": ("query_block",),
    }

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"block_rank": list(range(self.k))}

    def place(self, call: AttentionCall) -> tuple[int, int]:
        """The first query block, and the heaviest."""
        return min((text.query // self.size for text in texts(call)), default=0), 0

    def measure(self, call: AttentionCall, reduced: Reduced, rows: Tensor | None) -> dict[str, Tensor]:
        """The heaviest blocks of a pass's query blocks; indices are one more, so that 0 is none."""
        i, _ = self.place(call)
        found: dict[str, list[tuple[slice, tuple[int, ...], Tensor]]] = {name: [] for name in self.dims}
        for text in texts(call):
            if text.query % self.size:
                raise HeadscopeError(
                    f"TopBlocks({self.size}) needs whole blocks of queries, but a pass begins at token {text.query} of "
                    "an example, padding not counted: choose chunks of a multiple of the size for texts without "
                    "padding on the left, and trace a finished text instead of a generation"
                )
            part = cut(call, text.examples, text.rows, text.keys)
            top = blocks.top_blocks(_behind(part, 0, text.key % self.size), size=self.size, top=self.k)
            index = torch.where(top.index < 0, 0, top.index + text.key // self.size + 1)
            lost = (0, self.k - index.shape[-1])
            values = (pad(index, lost), pad(top.mass, lost), top.residual)
            for name, value in zip(self.dims, values, strict=True):
                found[name].append((text.examples, (text.query // self.size - i, 0)[: value.dim() - 2], value))
        whole = {name: _together(call, held, len(self.dims[name])) for name, held in found.items()}
        return {**whole, "top_blocks": whole["top_blocks"].long()}

    def finish(self, name: str, array: NDArray[Any], first: int, stop: int) -> NDArray[Any]:
        """Indices as they are; nothing of blocks without a query."""
        count = array.shape[-len(self.dims[name])]
        without = _tokens(stop, self.size, count) == _tokens(first, self.size, count)
        without = without if len(self.dims[name]) == 1 else without[:, None]
        return np.where(without, -1, array - 1) if name == "top_blocks" else np.where(without, np.nan, array)

    def bytes_a_head(self, tokens: int) -> int:
        """An index and a mass for every rank, and the rest."""
        return -(-tokens // self.size) * (12 * self.k + 4)


class _Text(NamedTuple):
    """Examples whose tokens are the same rows and keys of a call, and where the first of both stand in the text."""

    examples: slice
    rows: slice
    keys: slice
    query: int
    key: int


def texts(call: AttentionCall) -> list[_Text]:
    """The tokens of a call without the padding: every example apart where there may be some."""
    mask, batch = call.mask, call.query.shape[0]
    rows, keys = slice(0, call.query.shape[2]), slice(0, call.key.shape[2])
    if mask.right is not None:  # a cache may have room for more keys than there are
        last = mask.query_offset + rows.stop + mask.right - mask.key_offset
        keys = slice(0, max(0, min(keys.stop, last)))
    if mask.start is None and mask.end is None:
        return [_Text(slice(0, batch), rows, keys, mask.query_offset, mask.key_offset)]
    starts = [0] if mask.start is None else mask.start.tolist()
    ends = [OPEN] if mask.end is None else mask.end.tolist()
    found = []
    for e in range(batch):
        start, end = starts[e % len(starts)], ends[e % len(ends)]
        i, j = _within(rows, start, end, mask.query_offset), _within(keys, start, end, mask.key_offset)
        if i.start < i.stop and j.start < j.stop:
            first = mask.query_offset + i.start - start, mask.key_offset + j.start - start
            found.append(_Text(slice(e, e + 1), i, j, *first))
    return found


def _within(side: slice, start: int, end: int, offset: int) -> slice:
    """Those of the places ``side`` that stand at positions ``start:end``."""
    return slice(max(side.start, start - offset), min(side.stop, end - offset))


def _lse(call: AttentionCall) -> Tensor:
    lse = call.attend(Request(output=False, lse=True)).lse
    assert lse is not None
    return lse


def _behind(call: AttentionCall, rows: int, keys: int) -> Scores:
    """The scores of a call behind so many rows and keys of zeros, of which the keys are hidden."""
    mask = replace(call.mask, query_offset=call.mask.query_offset - rows, key_offset=call.mask.key_offset - keys)
    bias = call.key_bias
    if keys:
        bias = call.query.new_zeros(1, 1, call.key.shape[2]) if bias is None else bias
        bias = pad(bias.float(), (keys, 0), value=-torch.inf)
    shifted = call.with_(
        query=pad(call.query, (0, 0, rows, 0)),
        key=pad(call.key, (0, 0, keys, 0)),
        value=pad(call.value, (0, 0, keys, 0)),
        mask=mask,
        key_bias=bias,
        position_bias=None if call.position_bias is None else pad(call.position_bias, (keys, 0, rows, 0)),
    )
    return (shifted if rows or keys else call).inputs()


def _together(call: AttentionCall, found: Iterable[tuple[slice, tuple[int, ...], Tensor]], dims: int = 2) -> Tensor:
    """Values (example, head, ...) of groups of examples, each at its place, in one tensor that is 0 elsewhere."""
    found = list(found)
    ends = [[at + n for at, n in zip(place, x.shape[2:], strict=True)] for _, place, x in found]
    sizes = [max(side) for side in zip(*ends, strict=True)] or [0] * dims
    first = found[0][2] if found else call.query.new_zeros(0, dtype=torch.float32)
    whole = first.new_zeros(*call.query.shape[:2], *sizes)
    for examples, place, x in found:
        whole[(examples, slice(None), *(slice(at, at + n) for at, n in zip(place, x.shape[2:], strict=True)))] = x
    return whole


def _tokens(length: int, size: int, count: int) -> NDArray[np.int64]:
    """How many of ``length`` tokens each of ``count`` blocks holds."""
    return np.clip(length - size * np.arange(count), 0, size)
