"""Attention by a product of mapped queries and keys that may be negative."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants.kernel import SOURCE
from headscope.interp.laboratory.variants.weights import LEAST, Weights
from headscope.kernels.score_edits import ScoreEdit


class KernelIdentity(Weights):
    """w = q.k / sqrt(d_head), not normalised.

    A pattern has no negative weights, so that a head is traced as two: of its positive weights and of its negative
    ones, each as shares of its own sum, |w| / sum |w|. The authors' metric, |w| over the sum of both, weighs the two by
    those sums (exp of ``logsumexp``). A half that has no weight in a row is traced as uniform there, with a sum of 0.
    """

    name: ClassVar[str] = "kernel_identity"
    source: ClassVar[str] = SOURCE
    maps: ClassVar[int] = 2
    normed: ClassVar[bool] = False

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        self.q, self.k = (nn.Linear(shape.width, shape.heads * self.d_head, bias=False) for _ in range(2))

    def log_weight(self, score: Tensor, head: Tensor) -> Tensor:
        return torch.where(head % 2 == 0, score, -score).clamp(min=LEAST).log()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        q = q.repeat_interleave(2, 1)
        edit = ScoreEdit(lambda s, b, h, i, j: self.log_weight(s, h))
        totals = self.totals(q, k, edit)
        z = totals * self.see(q, k, v, edit)
        apart = z[:, ::2] - z[:, 1::2]
        return apart / (totals[:, ::2] - totals[:, 1::2]).abs().clamp(min=1) if self.normed else apart


class KernelIdentityNormed(KernelIdentity):
    """``KernelIdentity`` divided by max(|sum w|, 1)."""

    name: ClassVar[str] = "kernel_identity_normed"
    normed: ClassVar[bool] = True
