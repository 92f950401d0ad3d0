"""Projection removal: take one direction out of what heads write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interventions.outputs.directions import AlongDirection


@dataclass(frozen=True, eq=False)
class ProjectHeads(AlongDirection):
    """Take the component along a direction out of the outputs z of ``heads``: z' = z - (u . z) u.

    Directional ablation (Arditi et al. 2024, arXiv 2406.11717, there on the residual stream; one step of
    INLP's null-space projection, arXiv 2004.07667), here on a head's z before the output projection: other heads and
    the MLPs may still write along W_O u. ``strength`` s takes the share s out. A direction of length 0 is refused by
    the head's name.

    What it does not show: that nothing of the concept is left; a probe may find it along other directions. The
    component's mean goes too: ``ClampHeads`` at the mean keeps it.
    """

    source: ClassVar[str] = "arXiv 2406.11717, 2004.07667"
    unit: ClassVar[str] = "share of u . z removed"

    def write(self, call: AttentionCall, z: Tensor, heads: list[int]) -> Tensor:
        """z without its part along u."""
        u = self.units(call)[None, :, None]
        return z - (z * u).sum(-1, keepdim=True) * u

    def matrices(self, layer: int, width: int) -> tuple[Tensor, Tensor]:
        """1 - u u'."""
        return self.held(layer, torch.zeros(len(self._held[layer]), dtype=torch.float64))
