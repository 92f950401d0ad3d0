"""The controlled network: attention layers of one head, nothing that mixes afterwards, and an MLP on the last row.

Wu et al. 2025 (arXiv 2502.01951), ``models.py`` of the authors' code: W_Q, W_K and W_V without bias, no W_O, no
normalisation, scores over sqrt(d), an optional residual stream, three layers of ReLU, a linear read-out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.attention.module import AttentionModule
from headscope.interp.errors import HeadscopeError
from headscope.kernels.masks import Mask
from headscope.kernels.score_edits import distance_slope

MASKS = ("full", "causal", "window", "prefix", "decay")
ENCODINGS = ("none", "sinusoidal", "rope")
BASE = 10000.0


class Attention(AttentionModule):
    """One head whose width is the stream's.

    Args:
        width: of the stream.
        layer: the layer's index.
        mask: what a query sees: ``full``, ``causal``, ``window`` (the last ``window`` positions, itself counted),
            ``prefix`` (causal, and the first ``prefix`` positions for all), ``decay`` (causal, and ``slope`` times the
            distance is subtracted from the scores: a weight of gamma^distance with gamma = e^-slope).
        rope: whether queries and keys are rotated.
        window, prefix, slope: of those masks.
    """

    slopes: Tensor

    def __init__(
        self, width: int, layer: int, *, mask: str, rope: bool, window: int = 5, prefix: int = 2, slope: float = 0.223
    ) -> None:
        super().__init__(1, layer)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.rope = rope
        self.mask = _mask(mask, window, prefix)
        self.decays = mask == "decay"
        self.register_buffer("slopes", torch.tensor([slope]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """z (batch, position, width) of ``x``, the same shape."""
        q, k, v = (project(x) for project in (self.query, self.key, self.value))
        if self.rope:
            q, k = rotated(q), rotated(k)
        edit = {"score_edit": distance_slope(self.slopes)} if self.decays else {}
        z = self.attend(q[:, None], k[:, None], v[:, None], self.mask, x.shape[-1] ** -0.5, **edit)
        return z[:, 0]


class Layer(nn.Module):
    """Attention, in place of the stream or beside it."""

    def __init__(self, attention: Attention, residual: bool) -> None:
        super().__init__()
        self.attention, self.residual = attention, residual

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.attention(x)
        return x + z if self.residual else z


class Network(nn.Module):
    """Logits of the labels (batch, label) from sequences (batch, position, width).

    Args:
        width: of the vectors.
        labels: classes of the read-out.
        depth: attention layers.
        mask, encoding: of ``MASKS`` and ``ENCODINGS``.
        residual: whether layers add to the stream.
        window, prefix, slope: of those masks, as for ``Attention``.

    Raises:
        HeadscopeError: no such mask or encoding.
    """

    def __init__(
        self,
        width: int,
        labels: int,
        depth: int,
        *,
        mask: str,
        encoding: str,
        residual: bool,
        window: int = 5,
        prefix: int = 2,
        slope: float = 0.223,
    ) -> None:
        super().__init__()
        for name, known in ((mask, MASKS), (encoding, ENCODINGS)):
            if name not in known:
                raise HeadscopeError(f"the controlled network knows {', '.join(known)}, not {name!r}")
        self.sinusoidal = encoding == "sinusoidal"
        sizes: dict[str, Any] = {"window": window, "prefix": prefix, "slope": slope}
        made = [Attention(width, n, mask=mask, rope=encoding == "rope", **sizes) for n in range(depth)]
        self.layers = nn.ModuleList([Layer(one, residual) for one in made])
        self.head = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(width, width), nn.ReLU())))
        self.out = nn.Linear(width, labels)

    def forward(self, x: Tensor) -> Tensor:
        if self.sinusoidal:
            x = x + sinusoids(x.shape[1], x.shape[2], x)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.out(self.head(x[:, -1]))
        return logits


def angles(length: int, width: int, like: Tensor) -> Tensor:
    """position / 10000^(2 i / width): (position, width / 2)."""
    at = torch.arange(length, dtype=like.dtype, device=like.device)
    rates = torch.arange(0, width, 2, dtype=like.dtype, device=like.device)
    return at[:, None] * torch.exp(rates * (-math.log(BASE) / width))


def sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    """Sines at even and cosines at odd coordinates: (position, width)."""
    turn = angles(length, width, like)
    return torch.stack([turn.sin(), turn.cos()], -1).flatten(-2)


def rotated(x: Tensor) -> Tensor:
    """RoPE on neighbouring pairs of coordinates, the first position is 0. (batch, position, width)"""
    turn = angles(x.shape[-2], x.shape[-1], x)
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = turn.cos(), turn.sin()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def _mask(name: str, window: int, prefix: int) -> Mask:
    if name == "full":
        return Mask.full()
    if name == "window":
        return Mask.causal(window=window)
    if name == "prefix":
        return Mask(right=None, rule=lambda b, h, q, k: (k <= q) | (k < prefix))
    return Mask.causal()
