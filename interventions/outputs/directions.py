"""What the edits of one direction of a head's output share: the direction, at length 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.head_tables import D_HEAD, TableEdit


@dataclass(frozen=True, eq=False)
class AlongDirection(TableEdit):
    """Base of the edits of the coordinate u . z, u being a head's direction brought to length 1.

    Args:
        directions: (layer, head, d_head), or (chosen head, d_head) in the order of ``heads``, of any length but 0.
    """

    directions: Tensor = field()

    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {"directions": (D_HEAD,)}

    def check(self, layers: int, heads: int) -> None:
        """Raise HeadscopeError for a head the model lacks, a table of another model, or a direction of length 0."""
        super().check(layers, heads)
        for layer, mine in self.heads.by_layer().items():
            for head, row in zip(mine, self.rows_of("directions", layer), strict=True):
                if not bool(row.any()):
                    raise HeadscopeError(
                        f"the direction of L{layer}H{head} is 0, so nothing of its output lies along it: leave the "
                        "head out, or give it a direction"
                    )

    def units(self, call: AttentionCall) -> Tensor:
        """The layer's directions at length 1: (chosen head, d_head), made once unless they are trained."""
        kept: dict[Any, Tensor] = vars(self)["_indices"]
        directions = self.table("directions", call)
        key = "units", call.layer, directions.device, directions.dtype
        if key in kept:
            return kept[key]
        with torch.inference_mode(False):
            found = _unit(directions)
        if not directions.requires_grad:
            kept[key] = found
        return found

    def held(self, layer: int, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """The map that sets the coordinates (chosen head,) float64: 1 - u u', and u times the coordinate."""
        u = _unit(self.rows_of("directions", layer).detach().double())
        return torch.eye(u.shape[1], dtype=torch.float64) - u[:, :, None] * u[:, None], coordinates[:, None] * u


def _unit(x: Tensor) -> Tensor:
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length
