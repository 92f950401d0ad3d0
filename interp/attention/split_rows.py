"""Context parallelism: a process holds two runs of the query rows of every layer, and fetches all keys and values.

One layer's keys and values are whole at a time, and no pattern is cut along its keys, so that a row's softmax needs no
merging: a row is computed as one process computes it. Columns are sums and maxima over the processes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import fields, replace
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.split import Split, SplitCall, joined_rows
from headscope.interp.attention.whole import Group, Shares, gather, over, plain, side_by_side
from headscope.interp.errors import HeadscopeError
from headscope.kernels.request import Columns, Reduced, ReducedColumns, Request


class SplitRows(Split):
    """Each process of ``group`` holds two runs of the positions of one text, of twice as many as processes: the first
    and the last, the second and the last but one. Under a causal mask all of them have as many pairs to weigh.

    Args:
        group: the processes.
        rank: this one among them.
        sizes: of the runs, in the order of the text.
    """

    along = 2

    def __init__(self, group: Group, rank: int, sizes: tuple[int, ...]) -> None:
        super().__init__(group, rank, Shares.paired(sizes))
        self.sizes = sizes

    @property
    def mine(self) -> tuple[tuple[int, int], ...]:
        """The runs (first, size) of this process."""
        return self.shares.runs[self.rank]

    def call(self, mine: AttentionCall) -> AttentionCall:
        mask = mine.mask
        hidden = (mask.start, mask.end, mask.origin, mask.segments, mask.rule, mine.position_bias)
        if any(x is not None for x in hidden) or mask.query_offset or mask.key_offset or mine.cross:
            raise HeadscopeError(
                f"layer {mine.layer} of {mine.module} has a mask made of tensors, not known beyond the tokens of "
                "one process: trace it on one process"
            )
        held = vars(mine) | {name: self.whole(getattr(mine, name), 2) for name in ("query", "key", "value")}
        return SplitCall(**held, split=self)

    def parts(self, call: AttentionCall) -> list[AttentionCall]:
        held = vars(call) | {"key": plain(call.key), "value": plain(call.value)}
        del held["split"]
        queries = torch.split(self.own(call.query), [size for _, size in self.mine], 2)
        return [
            AttentionCall(**(held | self._rows_of(call, first, query)))
            for (first, _), query in zip(self.mine, queries, strict=True)
        ]

    def _rows_of(self, call: AttentionCall, first: int, query: Tensor) -> dict[str, Any]:
        """What of ``call`` is its rows': those of ``query`` (batch, head, query, d_head), from ``first`` on."""
        rows, bias, move = slice(first, first + query.shape[2]), call.position_bias, call.redistribution
        return {
            "query": query,
            "mask": replace(call.mask, query_offset=call.mask.query_offset + first),
            "position_bias": None if bias is None else bias[:, :, rows],
            "redistribution": None if move is None else move.of_rows(rows),
        }

    def attend(self, call: AttentionCall, request: Request) -> Reduced:
        asked = [self._asked(request, first, first + size) for first, size in self.mine]
        found = [part.attend(each) for part, each in zip(self.parts(call), asked, strict=True)]
        mine = _one_after_another(found)
        shares = Shares.paired(self._rows_of_each(request))

        def join(x: Tensor) -> Tensor:
            return gather(x, 2, shares, self.group)

        whole = joined_rows(mine, join, tuple(self._columns(each) for each in mine.columns))
        if mine.output is not None:
            whole.output = self.whole(mine.output, 2)
        return whole

    def _asked(self, request: Request, first: int, stop: int) -> Request:
        """What of ``request`` belongs to a run of rows."""
        rows, targets = request.query_rows, request.targets
        if rows is not None:
            rows = rows[(rows >= first) & (rows < stop)] - first
        columns = []
        for each in request.columns:
            low, high = (min(max(at, first), stop) - first for at in each.rows(self.shares.count))
            columns.append(replace(each, queries=(low, high)))
        here = None if targets is None else targets[:, first:stop]
        return replace(request, query_rows=rows, targets=here, columns=tuple[Columns, ...](columns))

    def _rows_of_each(self, request: Request) -> tuple[int, ...]:
        """How many rows statistics are of, in each run of the text."""
        if request.query_rows is None:
            return self.sizes
        rows = request.query_rows.tolist()
        ends = [bisect_left(rows, first) for first in (0, *accumulate(self.sizes))]
        return tuple(stop - begin for begin, stop in pairwise(ends))

    def _columns(self, mine: ReducedColumns) -> ReducedColumns:
        total, most = dist.ReduceOp.SUM, dist.ReduceOp.MAX
        return ReducedColumns(self._over(mine.sum, total), self._over(mine.max, most), self._over(mine.count, total))

    def _over(self, x: Tensor | None, how: Any) -> Tensor | None:
        return x if x is None else over(x, how, self.group)


def _one_after_another(found: list[Reduced]) -> Reduced:
    """The reductions of a process's runs as those of its rows."""
    rows = {}
    for name in (each.name for each in fields(Reduced) if each.name != "columns"):
        held = [x for each in found if (x := getattr(each, name)) is not None]
        rows[name] = side_by_side(held, 2) if held else None
    columns = zip(*(each.columns for each in found), strict=True)
    return Reduced(**rows, columns=tuple(_of_all_rows(each) for each in columns))


def _of_all_rows(runs: tuple[ReducedColumns, ...]) -> ReducedColumns:
    def reduced(name: str, how: Callable[..., Tensor]) -> Tensor | None:
        held = [x for each in runs if (x := getattr(each, name)) is not None]
        return reduce(how, held) if held else None

    return ReducedColumns(reduced("sum", torch.add), reduced("max", torch.maximum), reduced("count", torch.add))
