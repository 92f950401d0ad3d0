"""Context parallelism: a process holds a run of the query rows of every layer, and fetches the other's keys and values.

One layer's keys and values are whole at a time, and no pattern is cut along its keys, so that a row's softmax needs no
merging: a row is computed as one process computes it. Columns are sums and maxima over the processes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.split import Split, SplitCall, joined_rows
from headscope.interp.attention.whole import over, plain, run_of
from headscope.interp.errors import HeadscopeError
from headscope.kernels.request import Columns, Reduced, ReducedColumns, Request


class SplitRows(Split):
    """Each process of ``group`` holds a run of the positions of one text, in the order of ranks."""

    along = 2

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

    def part(self, call: AttentionCall) -> AttentionCall:
        first, rows = self.here.start, self.here
        bias, move = call.position_bias, call.redistribution
        held = vars(call) | {"query": run_of(call.query, 2, first, self.sizes[self.rank])}
        held |= {"key": plain(call.key), "value": plain(call.value)}
        held["mask"] = replace(call.mask, query_offset=call.mask.query_offset + first)
        held["position_bias"] = None if bias is None else bias[:, :, rows]
        held["redistribution"] = None if move is None else move.of_rows(rows)
        del held["split"]
        return AttentionCall(**held)

    def attend(self, call: AttentionCall, request: Request) -> Reduced:
        found = self.part(call).attend(self._asked(request))
        counts = self._rows_of_each(request)

        def join(x: Tensor) -> Tensor:
            return self.joined(x, 2, counts)

        whole = joined_rows(found, join, tuple(self._columns(each) for each in found.columns))
        if found.output is not None:
            whole.output = self.whole(found.output, 2)
        return whole

    def _asked(self, request: Request) -> Request:
        """What of ``request`` belongs to the rows of this process."""
        first, stop = self.here.start, self.here.stop
        rows, targets = request.query_rows, request.targets
        if rows is not None:
            rows = rows[(rows >= first) & (rows < stop)] - first
        columns = []
        for each in request.columns:
            low, high = (min(max(at, first), stop) - first for at in each.rows(self.count))
            columns.append(replace(each, queries=(low, high)))
        here = None if targets is None else targets[:, first:stop]
        return replace(request, query_rows=rows, targets=here, columns=tuple[Columns, ...](columns))

    def _rows_of_each(self, request: Request) -> tuple[int, ...]:
        if request.query_rows is None:
            return self.sizes
        starts = [sum(self.sizes[:rank]) for rank in range(len(self.sizes))]
        rows = request.query_rows
        return tuple(int(((rows >= a) & (rows < a + n)).sum()) for a, n in zip(starts, self.sizes, strict=True))

    def _columns(self, mine: ReducedColumns) -> ReducedColumns:
        total, most = dist.ReduceOp.SUM, dist.ReduceOp.MAX
        return ReducedColumns(self._over(mine.sum, total), self._over(mine.max, most), self._over(mine.count, total))

    def _over(self, x: Tensor | None, how: Any) -> Tensor | None:
        return x if x is None else over(x, how, self.group)
