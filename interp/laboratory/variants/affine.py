"""Affine-scaled attention: weights that need not sum to 1."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants.base import Variant
from headscope.kernels import reference


class Affine(Variant):
    """Weights a(x) softmax(q.k / sqrt(d_head)) + b(x) / n, over the n keys that a query sees.

    a and b are numbers of a query and head. [OURS], the formula was read in the abstract only: a = 2 sigmoid(f(x)) and
    b = tanh(g(x)), f and g linear. The pattern traced is the softmax: it does not show how much of it is read, nor what
    is read of every key alike.
    """

    name: ClassVar[str] = "affine"
    source: ClassVar[str] = "Bae et al. 2026, arXiv 2602.23057"

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        self.scale, self.even = (nn.Linear(shape.width, shape.heads, bias=False) for _ in range(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        seen = reference.dense_mask(self.shape.mask, q.shape, k.shape[2], q.device)[:1].to(v.dtype)
        of_all = (seen / seen.sum(-1, keepdim=True)) @ v
        a, b = (f(x).transpose(1, 2)[..., None] for f in (self.scale, self.even))
        weighted: Tensor = 2 * a.sigmoid() * self.see(q, k, v) + b.tanh() * of_all
        return weighted
