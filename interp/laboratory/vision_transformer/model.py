"""A vision transformer that can be read in one sitting."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from headscope.interp.attention.module import AttentionModule
from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import check_counts
from headscope.kernels.masks import Mask


class Seen(NamedTuple):
    """``logits`` (picture, class), and ``cls`` (picture, width), the CLS token's state before the final norm."""

    logits: Tensor
    cls: Tensor


class Attention(AttentionModule):
    """Every token sees every token."""

    def __init__(self, width: int, heads: int, layer: int) -> None:
        super().__init__(heads, layer)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the stream: ``x`` (picture, token, width), normed."""
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        z = self.attend(q, k, v, Mask.full(), q.shape[-1] ** -0.5)
        added: Tensor = self.out(z.transpose(1, 2).flatten(2))  # heads stand one after the other
        return added


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm, both added to the stream."""

    def __init__(self, width: int, heads: int, hidden: int, layer: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads, layer)
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inward, self.outward = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (picture, token, width)."""
        x = x + self.attention(self.before_attention(x))
        added: Tensor = self.outward(gelu(self.inward(self.before_mlp(x))))
        return x + added


class VisionTransformer(nn.Module):
    """Dosovitskiy et al. 2021 (arXiv 2010.11929) in small: patches, a CLS token before them, learned positions, blocks
    with the norm in front, and a linear reading of CLS.

    Token 0 is CLS, token 1 + row * grid + column a patch.

    Args:
        side: pixels a side of a picture.
        grid: patches a side.
        width: of the stream.
        heads, layers: attention heads of a layer, and layers.
        hidden: the MLP's width.
        classes: that it tells apart.

    Raises:
        HeadscopeError: patches that do not fit the picture, or heads that do not fit the width.
    """

    def __init__(
        self, side: int, grid: int, *, width: int = 64, heads: int = 4, layers: int = 4, hidden: int = 128,
        classes: int = 10,
    ) -> None:  # fmt: skip
        super().__init__()
        check_counts(1, grid=grid, width=width, heads=heads, layers=layers, hidden=hidden, classes=classes)
        if side % grid:
            raise HeadscopeError(f"pictures of {side} pixels a side are not {grid} whole patches; take a divisor")
        if width % heads:
            raise HeadscopeError(f"width {width} is not shared equally by {heads} heads")
        self.grid, self.patch, self.heads = grid, side // grid, heads
        self.embed = nn.Linear(self.patch**2, width)
        self.cls = nn.Parameter(0.02 * torch.randn(width))
        self.places = nn.Parameter(0.02 * torch.randn(1 + grid**2, width))
        self.layers = nn.ModuleList(Block(width, heads, hidden, layer) for layer in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, pictures: Tensor) -> Seen:
        """``pictures`` (picture, side, side)."""
        size = self.patch
        cut = pictures.unfold(1, size, size).unfold(2, size, size).flatten(3).flatten(1, 2)  # merges the grid's axes
        x = torch.cat([self.cls.expand(len(cut), 1, -1), self.embed(cut)], 1) + self.places
        for layer in self.layers:
            x = layer(x)
        return Seen(self.head(self.norm(x[:, 0])), x[:, 0])
