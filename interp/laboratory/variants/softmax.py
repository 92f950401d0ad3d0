"""Softmax attention, what every variant is held against."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from headscope.interp.laboratory.variants.base import Variant


class Softmax(Variant):
    """softmax(q.k / sqrt(d_head)) v."""

    name: ClassVar[str] = "softmax"
    source: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762, eq. 1"

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.see(q, k, v)
