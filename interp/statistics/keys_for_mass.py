"""How few keys hold most of a query's attention: (example, layer, head, query)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.base import CallStatistic
from headscope.kernels.kept import fewest
from headscope.kernels.request import Reduced

TILE = 1 << 22  # weights held at a time


@dataclass(frozen=True)
class KeysForMass(CallStatistic):
    """The fewest keys of a query that together hold ``share`` of its mass: (example, layer, head, query).

    The smallest budget at which the best keys for this very query, and for no other, would keep so much: what an ideal
    sparse pattern needs (MInference counts the same, arXiv 2407.02490, Section 2). 0 for a query that sees no key. A
    sink logit's weight is no key's mass. What it does not show: whether the next query needs the same keys.
    """

    share: float = 0.95
    name: ClassVar[str] = "keys_for_mass"
    unit: ClassVar[str] = "keys"
    source: ClassVar[str] = "arXiv 2407.02490"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise HeadscopeError(f"KeysForMass(share={self.share!r}): a share of the mass is above 0 and at most 1")

    def measure(self, call: AttentionCall, reduced: Reduced, rows: Tensor | None) -> dict[str, Tensor]:
        """A few rows at a time, each with all of its keys."""
        batch, heads, queries, _ = call.query.shape
        at = torch.arange(queries, device=call.query.device) if rows is None else rows
        step = max(1, TILE // (batch * heads * call.key.shape[2]))
        found = [call.query.new_zeros(batch, heads, 0, dtype=torch.float32)]
        for some in torch.split(at, step) if len(at) else ():
            first = int(some[0])
            p = call.pattern(slice(first, int(some[-1]) + 1))[:, :, some - first]
            found.append(fewest(p, self.share).to(found[0].dtype))
        return {self.name: torch.cat(found, dim=2)}
