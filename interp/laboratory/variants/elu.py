"""Attention by elu + 1 of the scores."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.laboratory.variants.weights import Weights


class EluNormed(Weights):
    """w = elu(q.k / sqrt(d_head)) + 1, divided by its row's sum: exp of a negative score, 1 + s of a positive one."""

    name: ClassVar[str] = "elu_normed"
    source: ClassVar[str] = "Gu et al. 2024, arXiv 2410.10781, section 7 (sail-sg/Attention-Sink, model_attn_sim.py)"

    def log_weight(self, score: Tensor, head: Tensor) -> Tensor:
        return torch.where(score > 0, score.clamp(min=0).log1p(), score)


class Elu(EluNormed):
    """w = elu(q.k / sqrt(d_head)) + 1, not normalised. The pattern traced is w / sum w."""

    name: ClassVar[str] = "elu"
    normed: ClassVar[bool] = False
