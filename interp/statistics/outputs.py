"""What heads wrote at chosen positions: (example, layer, head, position, ...)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.base import OUTPUT, Kind, Plan, Reader, Statistic, need
from headscope.kernels.request import Attended


@dataclass(frozen=True)
class HeadOutput(Statistic):
    """The heads' outputs z at chosen prompt positions: ``z`` (example, layer, head, position, d_head), after any edits.

    ``positions`` count from the example's first token, or from its end where negative (-1: the last prompt token). Read
    from the first forward pass of a prompt.
    """

    positions: tuple[int, ...] = (-1,)
    name: ClassVar[str] = "z"
    kind: ClassVar[Kind] = OUTPUT

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"position": list(self.positions)}

    def ask(self, plan: Plan) -> Reader:
        call = plan.call
        rows = self.rows(call)

        def read(seen: Attended) -> dict[str, Tensor]:
            z = need(seen.output)
            index = rows[:, None, :, None].expand(z.shape[0], z.shape[1], -1, z.shape[3])
            return {"z": z.gather(2, index)}

        return read

    def rows(self, call: AttentionCall) -> Tensor:
        """Row index of each position in this call: (batch or 1, position)."""
        mask, queries = call.mask, call.query.shape[2]
        start = torch.zeros(1, dtype=torch.long) if mask.start is None else mask.start.cpu()
        end = torch.full((1,), mask.query_offset + queries) if mask.end is None else mask.end.cpu()
        wanted = torch.tensor(self.positions)
        at = torch.where(wanted < 0, end[:, None] + wanted, start[:, None] + wanted)
        row = at - mask.query_offset
        if bool(((at < start[:, None]) | (at >= end[:, None]) | (row < 0) | (row >= queries)).any()):
            raise HeadscopeError(f"positions {list(self.positions)} do not all exist in a prompt of this length")
        return row.to(call.query.device)
