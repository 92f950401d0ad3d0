"""Sigmoid attention."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from headscope.interp.laboratory.variants.weights import Weights


class SigmoidNormed(Weights):
    """w = sigmoid(q.k / sqrt(d_head)), divided by its row's sum (the authors add 1e-8 to it)."""

    name: ClassVar[str] = "sigmoid_normed"
    source: ClassVar[str] = "Gu et al. 2024, arXiv 2410.10781, section 7 (sail-sg/Attention-Sink, model_attn_sim.py)"

    def log_weight(self, score: Tensor, head: Tensor) -> Tensor:
        return logsigmoid(score)


class Sigmoid(SigmoidNormed):
    """w = sigmoid(q.k / sqrt(d_head)), not normalised: a row may read nothing. The pattern traced is w / sum w."""

    name: ClassVar[str] = "sigmoid"
    normed: ClassVar[bool] = False
