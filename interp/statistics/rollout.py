"""What the inputs at named positions come to, layer by layer, by attention alone: (example, layer, head, query)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.base import GAPS, PACKED, CallStatistic, Plan, need
from headscope.interp.statistics.plan import concatenate
from headscope.interp.statistics.spans import members
from headscope.kernels.request import Reduced, Request


@dataclass(frozen=True, eq=False)
class Rollout(CallStatistic):
    """The share of each query that comes from ``spans`` of the input, were attention all that moves it, dimension
    ``source``: ``rollout`` (example, layer, head, query, source).

    With A_t the mean pattern of layer t's heads, P_t = A_t P_(t-1) and P_(-1) = 1: the cumulative context probability
    of Wu et al. 2025 (arXiv 2502.01951), which is attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928). A
    head's own is what it reads of that, A_(t,h) P_(t-1); their mean over heads is P_t. [OURS]: several heads, which
    the paper's models do not have, are averaged before the product. With a ``residual`` share r, A becomes
    r + (1 - r) A (0.5 for rollout). Summed over spans that part the text it is 1, less what a sink logit takes.

    ``spans`` as in ``SpanMass``. Layer by layer sums of p times P are all that is computed: memory is one number a
    query and source, and every layer of the tower has to be traced, in order.
    """

    spans: Mapping[str, Any] = field(default_factory=lambda: {"first": (0, 1)})
    residual: float = 0.0
    name: ClassVar[str] = "rollout"
    held: ClassVar[tuple[str, ...]] = ("spans",)
    unit: ClassVar[str] = "share of the input"
    source: ClassVar[str] = "arXiv 2502.01951"
    refused: ClassVar[Mapping[str, str]] = {
        **GAPS,
        **PACKED,
        "cache": "the earlier tokens' own shares are not in this pass",
        "chunked prefill": "the earlier tokens' own shares are not in this pass",
        "cross-attention": "positions would count in the other sequence",
    }
    _held: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # the last layer seen, and its P

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.residual < 1.0:
            raise HeadscopeError(f"residual={self.residual} is the share of the residual stream: 0 <= residual < 1")

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        return {"source": list(self.spans)}

    def measure(self, call: AttentionCall, reduced: Reduced, rows: Tensor | None) -> dict[str, Tensor]:
        """One layer of the product; layer 0 begins a new one."""
        if call.mask.query_offset:
            raise HeadscopeError(
                "Rollout is a product over the whole text, but this pass continues a cache: trace the text in one pass"
            )
        if call.layer and self._held.get("layer") != call.layer - 1:
            raise HeadscopeError(
                f"Rollout is a product over layers, but the layer before {call.layer} of {call.module} was not traced, "
                "or does not attend: trace every layer of a model whose layers all attend"
            )
        before = self._held["shares"].to(call.query.device) if call.layer else self._inputs(call)
        room = call.key.shape[2] - before.shape[1]  # of a cache that has room for more keys than there are
        here = need(call.attend(Request(output=False, linear=pad(before, (0, 0, 0, room)))).linear)
        shares = self.residual * before[:, None] + (1.0 - self.residual) * here
        self._held.update(layer=call.layer, shares=shares.mean(dim=1))
        return {self.name: shares if rows is None else shares[:, :, rows]}

    def _inputs(self, call: AttentionCall) -> Tensor:
        """Which position each source holds: (batch, position, source)."""
        batch, at = call.query.shape[0], Plan(call).query_positions
        columns = [members(span, at, batch)[..., None] for span in self.spans.values()]
        wide = torch.promote_types(call.query.dtype, torch.float32)
        return concatenate(columns).expand(batch, -1, -1).to(wide)
