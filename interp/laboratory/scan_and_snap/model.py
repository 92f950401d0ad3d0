"""The paper's model: attention of the last token, normalised, and a linear decoder, over one-hot tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from headscope.interp.attention.module import AttentionModule
from headscope.kernels.masks import Mask


class Attention(AttentionModule):
    """One head of the last token over those before it, with a free logit for each pair of query and key token.

    ``logits`` (query token, key token) is the paper's Z: embeddings and W_Q W_K^T merged. No position is encoded, and
    the last token does not see itself.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__(1, 0)
        self.logits = nn.Parameter(torch.zeros(vocabulary, vocabulary))

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """How much of each token attention holds, (batch, vocabulary)."""
        keys = one_hot(before, len(self.logits)).to(self.logits.dtype)[:, None]
        mask = Mask.causal(query_offset=before.shape[1])
        return self.attend(self.logits[last][:, None, None], keys, keys, mask, 1.0)[:, 0, 0]


class Layer(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.attention = Attention(vocabulary)


class OneLayer(nn.Module):
    """Logits of the next token (batch, vocabulary) = Y u / |u|, where u is what attention holds of each token.

    ``decoder`` is the paper's Y (next token, key token). Both matrices begin at 0, so attention is uniform.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(vocabulary)])
        self.decoder = nn.Parameter(torch.zeros(vocabulary, vocabulary))

    @property
    def attention(self) -> Attention:
        held = self.layers[0].attention
        assert isinstance(held, Attention)
        return held

    def scatter(self) -> OneLayer:
        """Begin at random instead, uniformly within 1 / sqrt(vocabulary), as ``nn.Linear`` does."""
        edge = len(self.decoder) ** -0.5
        for matrix in (self.attention.logits, self.decoder):
            nn.init.uniform_(matrix, -edge, edge)
        return self

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        return normalize(self.attention(before, last), dim=-1) @ self.decoder.T
