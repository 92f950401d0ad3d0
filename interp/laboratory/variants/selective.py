"""Selective attention: a temperature of each query, and a gain of each value."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants.base import Variant


class Selective(Variant):
    """softmax(t(x) q.k / sqrt(d_head)) with v scaled by its own t(x), a number a token and head.

    t = tanh(f(x)) + 1 + sigmoid(a) log n at the n-th token (from 1), a learned for each head; values have no part of
    position. [OURS]: f is linear (the paper's is small and shared). The formula is from memory.
    """

    name: ClassVar[str] = "selective"
    source: ClassVar[str] = "Zhang et al. 2024, arXiv 2411.12892, section 3"

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        self.of_query, self.of_value = (nn.Linear(shape.width, shape.heads, bias=False) for _ in range(2))
        self.by_position = nn.Parameter(torch.zeros(shape.heads, 1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        gain, of_value = (1 + f(x).tanh().transpose(1, 2) for f in (self.of_query, self.of_value))
        n = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        gain = gain + self.by_position.sigmoid() * n.log()  # (batch, head, query)
        return self.see(gain[..., None] * q, k, of_value[..., None] * v)
