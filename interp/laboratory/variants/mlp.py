"""Attention by a product of queries and keys that an MLP maps."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants.signed import KernelIdentity


class KernelMlp(KernelIdentity):
    """w = phi(q).phi(k) / sqrt(d_head), phi two layers of d_head with a ReLU between, after rotation, not normalised.
    Traced as ``KernelIdentity`` is; one phi for all heads and for queries and keys [OURS: the code was not read]."""

    name: ClassVar[str] = "kernel_mlp"

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        self.phi = nn.Parameter(torch.randn(2, self.d_head, self.d_head) * (2 / self.d_head) ** 0.5)

    def map(self, x: Tensor) -> Tensor:
        """phi of queries or keys (batch, head, position, d_head)."""
        return (x @ self.phi[0]).relu() @ self.phi[1]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return super().mix(self.map(q), self.map(k), v, x)


class KernelMlpNormed(KernelMlp):
    """``KernelMlp`` divided by max(|sum w|, 1)."""

    name: ClassVar[str] = "kernel_mlp_normed"
    normed: ClassVar[bool] = True
