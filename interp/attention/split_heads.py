"""Tensor parallelism: a process holds some query heads of every layer, and the key/value heads that they read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.parts import some_heads
from headscope.interp.attention.split import Split, SplitCall, joined_rows
from headscope.interp.attention.whole import Group, Shares, gather
from headscope.kernels.request import Reduced, ReducedColumns, Request


class SplitHeads(Split):
    """Each process of ``group`` holds as many query heads, in the order of ranks.

    Key/value heads are shared out alike. One that all processes hold (fewer key/value heads than processes) is shown
    once a process, which is the same attention.
    """

    along = 1

    def __init__(self, group: Group, rank: int, sizes: tuple[int, ...]) -> None:
        super().__init__(group, rank, Shares.in_order(sizes))

    def call(self, mine: AttentionCall) -> AttentionCall:
        kv = Shares.in_order((mine.key.shape[1],) * len(self.shares.runs))
        held: dict[str, Any] = vars(mine) | {"query": self.whole(mine.query, 1)}
        held |= {name: self.whole(held[name], 1, kv) for name in ("key", "value")}
        if mine.sinks is not None:
            held["sinks"] = self.whole(mine.sinks, 0)
        if mine.position_bias is not None and mine.position_bias.shape[1] > 1:
            held["position_bias"] = self.whole(mine.position_bias, 1)
        return SplitCall(**held, split=self)

    def parts(self, call: AttentionCall) -> list[AttentionCall]:
        ((first, size),) = self.shares.runs[self.rank]
        return [some_heads(call, slice(first, first + size))]

    def attend(self, call: AttentionCall, request: Request) -> Reduced:
        (part,) = self.parts(call)
        found, mine = part.attend(request), self.shares.sizes[self.rank]

        def join(x: Tensor) -> Tensor:
            return gather(x, 1, self.shares, self.group)

        def column(x: Tensor | None) -> Tensor | None:  # a count may be the same for every head
            return x if x is None or x.shape[1] != mine else join(x)

        columns = tuple(ReducedColumns(column(c.sum), column(c.max), column(c.count)) for c in found.columns)
        whole = joined_rows(found, join, columns)
        if found.output is not None:
            whole.output = self.whole(found.output, 1)
        return whole
