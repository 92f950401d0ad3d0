"""Attention calls of which each process holds a part: some of the heads (tensor parallelism) or some of the query rows
(context parallelism).

Handlers are shown the whole call, with its global head numbers and positions, in every process. What an engine computes
is this process's part; reductions are joined, which are small, and the heads' outputs when somebody reads them. So
statistics and edits know nothing of processes: every process has the whole record, and an edit changes what one process
would have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.whole import Group, Shares, Whole, plain, share_of, side_by_side
from headscope.kernels.request import Reduced, ReducedColumns, Request
from headscope.kernels.scores import Scores


class Split:
    """How the calls of one model are shared out over the processes of ``group``, of which this one is ``rank``."""

    along = 0  # the dimension of z (batch, head, query, d_value) that is shared out

    def __init__(self, group: Group, rank: int, shares: Shares) -> None:
        self.group, self.rank, self.shares = group, rank, shares

    def whole(self, x: Tensor, along: int, shares: Shares | None = None) -> Whole:
        """The tensor of which this process holds ``x``; ``shares`` where they are not those of heads or rows."""
        return Whole(x, along, self.shares if shares is None else shares, self.group, self.rank)

    def own(self, z: Tensor) -> Tensor:
        """This process's part of the outputs z."""
        return share_of(z, self.along, self.shares, self.rank)

    def call(self, mine: AttentionCall) -> AttentionCall:
        """The whole call of which this process holds ``mine``."""
        raise NotImplementedError

    def parts(self, call: AttentionCall) -> list[AttentionCall]:
        """What this process computes of the whole ``call``, after edits; one after the other along ``along``."""
        raise NotImplementedError

    def output(self, call: AttentionCall) -> Tensor:
        """The outputs z of the whole ``call``; they are fetched when they are read."""
        return self.whole(side_by_side([part.output() for part in self.parts(call)], self.along), self.along)

    def attend(self, call: AttentionCall, request: Request) -> Reduced:
        """Every reduction of the whole ``call``; its output is fetched when it is read."""
        raise NotImplementedError


@dataclass(eq=False)
class SplitCall(AttentionCall):
    """The whole of a call whose parts are computed where ``split`` says."""

    split: Split | None = None

    def _shared_out(self) -> bool:
        """Not where somebody took single heads or rows of it: those are computed in every process."""
        return self.split is not None and self.query.shape[self.split.along] == self.split.shares.count

    def attend(self, request: Request) -> Reduced:
        if not self._shared_out():
            return super().attend(request)
        assert self.split is not None
        return self.split.attend(self, request)

    def output(self) -> Tensor:
        if not self._shared_out():
            return super().output()
        assert self.split is not None
        return self.split.output(self)

    def pattern(self, rows: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        return unsplit(self).pattern(rows, keys)

    def inputs(self) -> Scores:
        return unsplit(self).inputs()


def unsplit(call: AttentionCall) -> AttentionCall:
    """The same call, whole in this process."""
    held: dict[str, Any] = {each.name: plain(getattr(call, each.name)) for each in fields(AttentionCall)}
    return AttentionCall(**held)


def joined_rows(part: Reduced, join: Callable[[Tensor], Tensor], columns: tuple[ReducedColumns, ...]) -> Reduced:
    """``part`` with everything that belongs to rows joined, and ``columns``; the output is left as it is."""
    rows = [each.name for each in fields(Reduced) if each.name not in ("output", "columns")]
    changed = {name: join(x) for name in rows if (x := getattr(part, name)) is not None}
    return replace(part, columns=columns, **changed)
