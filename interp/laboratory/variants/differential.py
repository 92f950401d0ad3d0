"""Differential attention: a second pattern is taken from the first."""

from __future__ import annotations

from math import exp
from typing import ClassVar

import torch
from torch import Tensor, nn

from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants.base import Variant


class Differential(Variant):
    """z = (softmax(q1.k1 / sqrt(d)) - lambda softmax(q2.k2 / sqrt(d))) v, with d half of d_head, so that it has as many
    parameters as softmax attention; then an RMS norm of each head, times 1 - lambda_0.

    lambda = exp(a1.b1) - exp(a2.b2) + lambda_0, of four learned vectors a layer; lambda_0 = 0.8 - 0.6 exp(-0.3 layer).
    A head is traced as its two patterns, side by side. The formula is from memory of the paper.
    """

    name: ClassVar[str] = "differential"
    source: ClassVar[str] = "Ye et al. 2024, arXiv 2410.05258, section 2.1"
    maps: ClassVar[int] = 2
    width_of: ClassVar[tuple[float, float]] = (0.5, 1)

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        self.parts = nn.Parameter(0.1 * torch.randn(2, 2, self.d_head))
        self.first_share = 0.8 - 0.6 * exp(-0.3 * layer)
        self.norm = nn.RMSNorm(self.d_value, eps=1e-5)

    @property
    def share(self) -> Tensor:
        """lambda: how much of the second pattern is taken off."""
        one, other = self.parts.prod(1).sum(-1).exp()
        taken: Tensor = one - other + self.first_share
        return taken

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        z = self.see(q, k, v.repeat_interleave(2, 1))
        apart: Tensor = (1 - self.first_share) * self.norm(z[:, ::2] - self.share * z[:, 1::2])
        return apart
