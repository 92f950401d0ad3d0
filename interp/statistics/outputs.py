"""What heads wrote at chosen positions: (example, layer, head, position, ..., d_head).

``positions`` of a prompt count from the example's first token, or from its end where negative (-1: the last prompt
token). They are read from the first forward pass of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.base import GAPS, OUTPUT, CallStatistic, Kind, Plan, Reader, Statistic, need
from headscope.interp.statistics.plan import concatenate
from headscope.interp.statistics.spans import members
from headscope.kernels.request import Reduced

_PROMPT = {
    **GAPS,
    "chunked prefill": "the end of the prompt is not known in its first pass",
    "cross-attention": "positions would count in the other sequence",
}


@dataclass(frozen=True)
class HeadOutput(Statistic):
    """The heads' outputs z at chosen positions: ``z`` (example, layer, head, position, d_head), after any edits."""

    positions: tuple[int, ...] = (-1,)
    name: ClassVar[str] = "z"
    unit: ClassVar[str] = "activation"
    refused: ClassVar[Mapping[str, str]] = _PROMPT
    kind: ClassVar[Kind] = OUTPUT

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"position": list(self.positions)}

    def ask(self, plan: Plan) -> Reader:
        """Ask for the output, which every call has."""
        rows = rows_of(self.positions, plan.call)

        def read(reduced: Reduced) -> dict[str, Tensor]:
            z = need(reduced.output)
            index = rows[:, None, :, None].expand(z.shape[0], z.shape[1], -1, z.shape[3])
            return {"z": z.gather(2, index)}

        return read


@dataclass(frozen=True)
class SpanOutput(CallStatistic):
    """What a head wrote from named spans of keys, sum_j p_ij v_j over each: ``z_span`` (example, layer, head, position,
    span, d_head).

    ``spans`` as in ``SpanMass``. Over spans that part the text it sums to z as attention gives it, before any edit of
    outputs. Through a head's slice of the output projection and a direction of the unembedding it is the direct logit
    attribution of a head *and* a span: LOCOS' phi, summed over the span (arXiv 2607.01002).
    """

    spans: Mapping[str, Any] = field(default_factory=dict)
    positions: tuple[int, ...] = (-1,)
    name: ClassVar[str] = "z_span"
    held: ClassVar[tuple[str, ...]] = ("spans",)
    unit: ClassVar[str] = "activation"
    source: ClassVar[str] = "arXiv 2607.01002"
    refused: ClassVar[Mapping[str, str]] = _PROMPT
    kind: ClassVar[Kind] = OUTPUT

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"position": list(self.positions), "span": list(self.spans)}

    def measure(self, call: AttentionCall, reduced: Reduced, chosen: Tensor | None) -> dict[str, Tensor]:
        """The weights of the chosen rows, and of the values what they give of each span."""
        at = Plan(call).key_positions
        batch, heads, keys = call.query.shape[0], call.query.shape[1], call.key.shape[2]
        inside = concatenate([members(span, at, batch)[..., None] for span in self.spans.values()])  # (., key, span)
        rows = rows_of(self.positions, call).expand(batch, -1)
        values = call.value.to(torch.promote_types(call.value.dtype, torch.float32))
        z = values.new_zeros(batch, heads, len(self.positions), len(self.spans), values.shape[3])
        for row in set(rows.flatten().tolist()):  # few rows, spans in pieces: ``kernels.spans`` is for every row
            p = call.pattern(rows=slice(row, row + 1)).to(values.dtype)  # (batch, head, 1, key)
            split = (p * inside.transpose(1, 2)[:, None]).reshape(batch, values.shape[1], -1, keys)
            here = (split @ values).view(batch, heads, 1, len(self.spans), -1)
            z = torch.where((rows == row)[:, None, :, None, None], here, z)
        return {"z_span": z}


def rows_of(positions: tuple[int, ...], call: AttentionCall) -> Tensor:
    """Row index of each position in a call: (batch or 1, position).

    Raises:
        HeadscopeError: a position that an example does not have, or that another pass holds.
    """
    mask, queries = call.mask, call.query.shape[2]
    start = torch.zeros(1, dtype=torch.long) if mask.start is None else mask.start.cpu()
    end = torch.full((1,), mask.query_offset + queries) if mask.end is None else mask.end.cpu()
    wanted = torch.tensor(positions)
    at = torch.where(wanted < 0, end[:, None] + wanted, start[:, None] + wanted)
    row = at - mask.query_offset
    if bool(((at < start[:, None]) | (at >= end[:, None]) | (row < 0) | (row >= queries)).any()):
        raise HeadscopeError(f"positions {list(positions)} do not all exist in a prompt of this length")
    return row.to(call.query.device)
