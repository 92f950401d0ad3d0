"""Shared differential attention: two patterns of one projection, each with an update of low rank."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants.differential import Differential


class Updated(nn.Module):
    """A projection for each of two maps a head, W + A1 B1 and W + A2 B2, of ``rank``: (batch, position, width) to
    (batch, position, head * 2 * d_head)."""

    def __init__(self, width: int, heads: int, d_head: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.base = nn.Linear(width, heads * d_head, bias=False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, 2 * heads * d_head, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        base, update = self.base(x), self.up(self.down(x))
        both: Tensor = base.unflatten(-1, (self.heads, 1, -1)) + update.unflatten(-1, (self.heads, 2, -1))
        return both.flatten(2)


class SharedDifferential(Differential):
    """``Differential`` whose two queries of a head share a matrix, and so its two keys: a differential amplifier.

    [OURS]: both updates share the factor that reads the stream, of rank d_head.
    """

    name: ClassVar[str] = "shared_differential"
    source: ClassVar[str] = "Cang et al. 2025, arXiv 2501.17900"

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        self.q, self.k = (Updated(shape.width, shape.heads, self.d_head, shape.d_head) for _ in range(2))
