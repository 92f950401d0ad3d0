"""Softplus attention with re-weighting."""

from __future__ import annotations

from math import log
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from headscope.interp.laboratory.variants.weights import LEAST, Weights
from headscope.kernels import reference
from headscope.kernels.score_edits import ScoreEdit

POWER = 3
FLOOR = 1e-6  # of what is raised to the power, so that a row always has weights: the first has one key, a = 1 = 1 / n


class SoftplusReweighted(Weights):
    """a = softplus(log(d_head) log(n) q.k / sqrt(d_head)) as shares of the row's n keys; then max(n a - 1, 0)^3, as
    shares again: what is below the mean is dropped, and what is above it sharpened.

    Scale, threshold and the power are from memory; [OURS]: 1e-6 in place of 0. What is traced are the final shares.
    """

    name: ClassVar[str] = "softplus"
    source: ClassVar[str] = "Gao and Spratling 2025, arXiv 2501.13428"

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        n = reference.dense_mask(self.shape.mask, q.shape, k.shape[2], q.device)[0, 0].sum(-1)  # (query,)
        by = log(self.d_head) * n.to(q.dtype).log()

        def first(s: Tensor, i: Tensor) -> Tensor:
            return softplus(by[i] * s).clamp(min=LEAST)

        totals = self.totals(q, k, ScoreEdit(lambda s, b, h, i, j: first(s, i).log()))[..., 0]

        def final(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return POWER * torch.log((n[i] * first(s, i) / totals[b, h, i] - 1).clamp(min=FLOOR))

        return self.see(q, k, v, ScoreEdit(final))
