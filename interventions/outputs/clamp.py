"""Clamping: hold the coordinate of what heads write along one direction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.outputs.directions import AlongDirection


@dataclass(frozen=True, eq=False)
class ClampHeads(AlongDirection):
    """Hold the coordinate of the outputs z of ``heads`` along a direction between two numbers, or at one.

    c = u . z, c' = min(max(c, low), high), z' = z + (c' - c) u. With ``low`` = ``high`` the coordinate is set: feature
    clamping (Templeton et al. 2024, *Scaling Monosemanticity*, there of sparse features in the residual stream), and at
    the coordinate's mean it is mean ablation of one direction. A coordinate within the bounds stays as it is, and an
    output whose coordinates all do is unchanged. A direction of length 0 is refused by the head's name.

    What it does not show: that values outside the bounds were the cause of what changes; the later layers also see
    fewer different inputs.

    Args:
        low: the least coordinate, in units of z: a number, or one a head, (layer, head) or (chosen head,). None: no
            bound.
        high: the greatest, likewise.
    """

    _: KW_ONLY
    low: float | Tensor | None = None
    high: float | Tensor | None = None

    source: ClassVar[str] = "Templeton et al. 2024 (feature clamping)"
    unit: ClassVar[str] = "u . z"
    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {**AlongDirection.tables, "low": (), "high": ()}

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: x for name in ("low", "high") if (x := getattr(self, name)) is not None}
        for name, x in given.items():
            number = isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
            if not number and not isinstance(x, Tensor):
                raise HeadscopeError(
                    f"ClampHeads: {name} must be a finite number, or a tensor of one a head, not {x!r}"
                )
        if not given:
            raise HeadscopeError("ClampHeads needs a bound: low, high or both (equal ones set the coordinate)")
        low, high = (torch.as_tensor(given.get(name, 0.0)) for name in ("low", "high"))
        if low.dim() and high.dim() and low.shape != high.shape:
            raise HeadscopeError(
                f"ClampHeads: low is {tuple(low.shape)}, high {tuple(high.shape)}; give both in one form"
            )
        if len(given) == 2 and bool((low > high).any()):
            raise HeadscopeError("ClampHeads: low is above high; give low <= high for every head")

    def write(self, call: AttentionCall, z: Tensor, heads: list[int]) -> Tensor:
        """z with its coordinate moved to the nearest bound."""
        u = self.units(call)[None, :, None]
        c = (z * u).sum(-1, keepdim=True)
        low, high = (
            self.table(name, call)[:, None, None] if isinstance(x, Tensor) else x
            for name, x in (("low", self.low), ("high", self.high))
        )
        held = c if low is None else c.clamp(min=low)
        held = held if high is None else held.clamp(max=high)
        return z + (held - c) * u

    def matrices(self, layer: int, width: int) -> tuple[Tensor, Tensor] | None:
        """Where the coordinate is set: 1 - u u', and u times its value."""
        low, high = (
            self.rows_of(name, layer).detach().double()
            if isinstance(x, Tensor)
            else torch.full((len(self._held[layer]),), math.nan if x is None else x, dtype=torch.float64)
            for name, x in (("low", self.low), ("high", self.high))
        )
        return self.held(layer, low) if torch.equal(low, high) else None  # nan equals nothing
