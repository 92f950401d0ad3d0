"""Attention by a product of mapped queries and keys, where that is never negative."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import elu

from headscope.interp.laboratory.variants.weights import LEAST, Weights

SOURCE = "Gu et al. 2024, arXiv 2410.10781, section 7 (sail-sg/Attention-Sink, model_attn_kernel.py)"


class KernelElu(Weights):
    """w = phi(q).phi(k) / sqrt(d_head) with phi = elu + 1, after rotation, not normalised. The pattern traced is
    w / sum w. ALiBi's slopes are taken off w, which then ends at 0."""

    name: ClassVar[str] = "kernel_elu"
    source: ClassVar[str] = SOURCE
    normed: ClassVar[bool] = False

    def log_weight(self, score: Tensor, head: Tensor) -> Tensor:
        return score.clamp(min=LEAST).log()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return super().mix(elu(q) + 1, elu(k) + 1, v, x)


class KernelEluNormed(KernelElu):
    """``KernelElu`` divided by its row's sum (the authors add 1e-8 to it)."""

    name: ClassVar[str] = "kernel_elu_normed"
    normed: ClassVar[bool] = True
