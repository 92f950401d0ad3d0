"""Dual triangle attention: half of a head looks back, and half ahead."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants.base import Variant
from headscope.kernels.masks import Mask

BOTH = Mask(right=None, rule=lambda b, h, q, k: ((h % 2 == 0) & (k <= q)) | ((h % 2 == 1) & (k >= q)))


class DualTriangle(Variant):
    """Half of a head's query and key dimensions attends to itself and what is before, half to itself and what follows.

    For texts that are read both ways. [OURS], since the abstract leaves it open: each half reads half of the values.
    A head is traced as its two halves.

    Raises:
        HeadscopeError: the shape's mask is not ``Mask.full()``.
    """

    name: ClassVar[str] = "dual_triangle"
    source: ClassVar[str] = "Hallee and Gleghorn 2026, arXiv 2604.18603"
    maps: ClassVar[int] = 2
    width_of: ClassVar[tuple[float, float]] = (0.5, 1)
    both_ways: ClassVar[bool] = True

    def __init__(self, shape: Shape, layer: int) -> None:
        if not shape.mask.is_full:
            raise HeadscopeError("dual_triangle reads a text both ways: give Shape(mask=Mask.full())")
        super().__init__(shape, layer)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        halves = torch.stack(v.chunk(2, -1), 2).flatten(1, 2)  # (batch, head * 2, position, d_value / 2)
        z = self.see(q, k, halves, mask=BOTH)
        return torch.cat([z[:, ::2], z[:, 1::2]], -1)
