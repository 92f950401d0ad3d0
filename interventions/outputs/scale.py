"""Head scaling: more or less of what a set of heads writes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.head_edit import HeadEdit


@dataclass(frozen=True, eq=False)
class ScaleHeads(HeadEdit):
    """Multiply the outputs z of ``heads`` by ``factor``.

    Args:
        factor: 0 is zero ablation, 1 changes nothing, above 1 amplifies, below 0 also turns around.
    """

    factor: float = 1.0

    source: ClassVar[str] = "Michel et al. 2019, arXiv 1905.10650 (the head mask)"
    unit: ClassVar[str] = "factor on z"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.factor):
            raise HeadscopeError(f"ScaleHeads: factor must be a finite number, not {self.factor}")

    def write(self, call: AttentionCall, z: Tensor, heads: list[int]) -> Tensor:
        """``factor`` times z."""
        return self.factor * z

    def matrices(self, layer: int, width: int) -> tuple[Tensor, Tensor]:
        """``factor`` times the identity."""
        count = len(self._held[layer])
        m = self.factor * torch.eye(width, dtype=torch.float64).repeat(count, 1, 1)
        return m, torch.zeros(count, width, dtype=torch.float64)
