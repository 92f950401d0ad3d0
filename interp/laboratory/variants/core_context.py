"""Core-context attention: far groups of tokens are read as one pooled key each, near tokens as they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants.base import Variant, check_causal
from headscope.kernels.masks import Mask

GROUP = 8


class CoreContext(Variant):
    """One softmax over the tokens of the query's own group and the one before, and over a core token of each group
    before those: its keys and values, averaged by what the group's last token attends to in the group.

    Core tokens stand at positions below 0, so that statistics of positions are those of single tokens, and their masses
    sum to less than 1 by what the cores take. [OURS], the formula is from the abstract and memory: groups of 8; keys
    are pooled after rotation; one softmax fuses both. Under ALiBi a core's slope counts from where it stands.

    Raises:
        HeadscopeError: the shape's mask is not plainly causal.
    """

    name: ClassVar[str] = "core_context"
    source: ClassVar[str] = "Chen et al. 2024, arXiv 2412.12465"

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        check_causal(self)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        whole = x.shape[1] // GROUP
        ends = x.shape[0], self.num_heads, whole, GROUP, self.d_head
        groups_k, groups_v = (t[:, :, : whole * GROUP].reshape(ends) for t in (k, v))
        last = q[:, :, : whole * GROUP].reshape(ends)[..., -1:, :]
        share = (self.d_head**-0.5 * last @ groups_k.mT).softmax(-1)  # (batch, head, group, 1, token)
        k, v = (torch.cat([(share @ g)[..., 0, :], t], 2) for g, t in ((groups_k, k), (groups_v, v)))

        def shown(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            near = i // GROUP - 1  # the first group whose tokens are seen one by one
            return torch.where(j < 0, j + whole < near, j // GROUP >= near)

        return self.see(q, k, v, mask=Mask(key_offset=-whole, rule=shown))
