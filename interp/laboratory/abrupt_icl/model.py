"""The attention-only network of Reddy (2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from headscope.interp.attention.module import AttentionModule
from headscope.interp.laboratory.abrupt_icl.data import Law
from headscope.kernels.masks import Mask


class OneHead(AttentionModule):
    """One causal head, as wide as the stream: scores q.k without a scale, and no output projection."""

    def __init__(self, layer: int, width: int, spread: float) -> None:
        super().__init__(1, layer)
        self.q, self.k, self.v = (nn.Parameter(spread * torch.randn(width, width)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = ((x @ w)[:, None] for w in (self.q, self.k, self.v))
        return self.attend(q, k, v, Mask.causal(), 1.0)[:, 0]


class Layer(nn.Module):
    """x + attention(x)."""

    def __init__(self, layer: int, width: int, spread: float) -> None:
        super().__init__()
        self.attention = OneHead(layer, width, spread)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attention(x)
        return out


class Dense(nn.Module):
    """relu(x W + b), b one number for all units (the authors' shape)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter((2 / width) ** 0.5 * torch.randn(width, width))
        self.bias = nn.Parameter(width**-0.5 * torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return relu(x @ self.weight + self.bias)


class Classifier(nn.Module):
    """Two layers of attention, three dense layers on the last row, and a reading of labels: tokens (example, row,
    width) to logits (example, label).

    Weights are drawn from torch's global state, which an experiment seeds: attention N(0, 1 / dimensions), dense
    N(0, 2 / width), its one bias and the reading N(0, 1 / width).
    """

    def __init__(self, law: Law) -> None:
        super().__init__()
        width = law.positions + law.dimensions
        self.layers = nn.ModuleList([Layer(i, width, law.dimensions**-0.5) for i in range(2)])
        self.dense = nn.Sequential(*(Dense(width) for _ in range(3)))
        self.read = nn.Parameter(width**-0.5 * torch.randn(width, law.labels))

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.dense(x[:, -1]) @ self.read
        return logits
