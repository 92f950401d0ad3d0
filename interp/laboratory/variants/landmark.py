"""Landmark attention: a block of keys is read through one score."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants.base import Variant, check_causal
from headscope.kernels.masks import Mask
from headscope.kernels.score_edits import ScoreEdit

BLOCK = 8


class Landmark(Variant):
    """One softmax over the query's own block and the landmarks of blocks before it, and what a landmark gets is shared
    among its block by a softmax of its own (grouped softmax).

    That is exactly a softmax of s + the landmark's score - logsumexp of s over the block. The paper puts a landmark
    token behind every block of 50; [OURS]: no token is put in, a landmark is a second key of the block's last token,
    and blocks are of 8. Landmarks have no slope under ALiBi. The formula is from memory of the paper.

    Raises:
        HeadscopeError: the shape's mask is not plainly causal.
    """

    name: ClassVar[str] = "landmark"
    source: ClassVar[str] = "Mohtashami and Jaggi 2023, arXiv 2305.16300, section 3"

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        check_causal(self)
        self.landmark = nn.Linear(shape.width, shape.heads * self.d_head, bias=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        length, whole = x.shape[1], x.shape[1] // BLOCK  # blocks that have come to their end
        if not whole:
            return self.see(q, k, v)
        marks = self.turned(self.split(self.landmark(x), self.d_head))[:, :, BLOCK - 1 :: BLOCK]
        every = self.scores(q, k, mask=Mask.full())[..., : whole * BLOCK]
        gate = self.d_head**-0.5 * q @ marks.mT - every.reshape(*every.shape[:3], whole, BLOCK).logsumexp(-1)
        own = (torch.arange(length, device=x.device) // BLOCK)[:, None]
        gate = pad(torch.where(torch.arange(whole, device=x.device) < own, gate, 0), (0, 1))  # and a block that goes on
        return self.see(q, k, v, ScoreEdit(lambda s, b, h, i, j: s + gate[b, h, i, j // BLOCK]))
