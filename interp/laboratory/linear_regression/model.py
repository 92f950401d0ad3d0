"""One layer of softmax attention from a query to its examples (He et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headscope.interp.attention.module import AttentionModule
from headscope.kernels.masks import Mask


class ToExamples(AttentionModule):
    """Heads as wide as a token; the query is no key."""

    def __init__(self, width: int, heads: int, outputs: int) -> None:
        super().__init__(heads)
        self.width = width
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, heads * width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(heads * width, outputs, bias=False)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """(prompt, 1, width) and (prompt, example, width) to (prompt, 1, output)."""
        shape = (self.num_heads, self.width)
        q, k, v = (
            project(x).unflatten(-1, shape).transpose(1, 2)
            for project, x in ((self.q_proj, query), (self.k_proj, context), (self.v_proj, context))
        )
        z = self.attend(q, k, v, Mask.full(), self.width**-0.5, cross=True)
        out: Tensor = self.o_proj(z.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Attention alone: no residual stream."""

    def __init__(self, width: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.attention = ToExamples(width, heads, outputs)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        out: Tensor = self.attention(query, context)
        return out


class Regressor(nn.Module):
    """``context`` (prompt, example, width) and ``query`` (prompt, width) to predictions (prompt, output).

    The authors' ``MultiHeadAttention``: PyTorch's default initialisation, from its global state.
    """

    def __init__(self, width: int, heads: int, outputs: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width, heads, outputs)])

    def forward(self, context: Tensor, query: Tensor) -> Tensor:
        out: Tensor = self.layers[0](query[:, None], context)
        return out[:, 0]

    @torch.no_grad()
    def circuits(self) -> tuple[Tensor, Tensor]:
        """Float64: KQ (head, width, width), from a query's entry (row) to a key's, times the scale, so that a score is
        query KQ key; and OV (head, width, output), what an entry of an example adds to the prediction.

        The paper's omega is in the same units: it divides by sqrt(d + 1), the scale (the authors' notebook by
        sqrt(d + 2)).
        """
        layer = self.layers[0]
        assert isinstance(layer, Layer)
        attention = layer.attention
        heads, width = attention.num_heads, attention.width
        q, k, v = (
            linear.weight.double().reshape(heads, width, width)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        o = attention.o_proj.weight.double().reshape(-1, heads, width)  # (output, head, width)
        return q.transpose(1, 2) @ k * width**-0.5, torch.einsum("hij,ohi->hjo", v, o)
