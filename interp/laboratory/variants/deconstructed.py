"""What is left of attention without tokens that mix, or without scores that depend on them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants.softmax import Softmax
from headscope.kernels.masks import Mask

_SOURCE = "Xue, Moosavi and Aletras 2025, arXiv 2510.11602 (their forms were not read: these are [OURS])"


class FixedScores(Softmax):
    """Queries and keys are learned vectors of positions: the pattern is the same for every text.

    Raises:
        HeadscopeError: a text is longer than the shape's context.
    """

    name: ClassVar[str] = "fixed_scores"
    source: ClassVar[str] = _SOURCE
    learned: ClassVar[bool] = True

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        del self.q, self.k
        drawn = torch.randn(2, shape.heads, shape.context, self.d_head)
        self.of_positions = nn.Parameter(drawn, requires_grad=self.learned)

    def looks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        length = x.shape[1]
        if length > self.shape.context:
            raise HeadscopeError(f"{self.name} has scores of {self.shape.context} tokens, not of {length}")
        q, k = self.of_positions[:, :, :length].unsqueeze(1).expand(-1, x.shape[0], -1, -1, -1)
        return q, k


class RandomScores(FixedScores):
    """``FixedScores`` as drawn at the beginning: never learned."""

    name: ClassVar[str] = "random_scores"
    learned: ClassVar[bool] = False


class NoMixing(Softmax):
    """Every token reads itself alone, z = v: an MLP in attention's place."""

    name: ClassVar[str] = "no_mixing"
    source: ClassVar[str] = _SOURCE

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        del self.q, self.k

    def looks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zero = x.new_zeros(x.shape[0], self.num_heads, x.shape[1], self.d_head)
        return zero, zero

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.see(q, k, v, mask=Mask.causal(window=1))
