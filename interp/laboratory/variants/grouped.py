"""Grouped differential attention: fewer patterns that are taken off than patterns that read."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants.differential import Differential


class GroupedDifferential(Differential):
    """``Differential`` whose second pattern is one for all heads of the layer, repeated as keys are in GQA.

    The paper's groups are of several sizes, best 3 to 4 reading heads to one; [OURS]: one group a layer. Its formula
    was read in the abstract only. A head is traced as its own pattern and the layer's.
    """

    name: ClassVar[str] = "grouped_differential"
    source: ClassVar[str] = "Lim et al. 2025, arXiv 2510.06949"

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        self.q, self.k = (nn.Linear(shape.width, (shape.heads + 1) * self.d_head, bias=False) for _ in range(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return super().mix(self.beside(q), self.beside(k), v, x)

    def beside(self, x: Tensor) -> Tensor:
        """(batch, head + 1, ...) to (batch, head * 2, ...): the last one after each of the others."""
        return torch.stack([x[:, :-1], x[:, -1:].expand_as(x[:, :-1])], 2).flatten(1, 2)
