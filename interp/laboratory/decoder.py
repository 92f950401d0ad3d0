"""A small LLaMA-style decoder whose attention is any variant of the bench."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import check_counts
from headscope.kernels.masks import Mask

POSITIONS = ("rope", "alibi", "learned", "none")


@dataclass(frozen=True)
class Shape:
    """What every variant is given.

    ``width`` is d_model, of which each of ``heads`` takes its share; ``hidden`` the gated MLP's width; ``context`` the
    longest text it learns (``"learned"`` positions go no further); ``positions`` one of ``POSITIONS``; ``mask`` what a
    query sees.

    Raises:
        HeadscopeError: sizes that do not fit, or positions that are not known.
    """

    vocabulary: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 128
    hidden: int = 256
    context: int = 128
    positions: str = "rope"
    mask: Mask = Mask.causal()

    def __post_init__(self) -> None:
        sizes = ("vocabulary", "layers", "heads", "width", "hidden", "context")
        check_counts(1, **{name: getattr(self, name) for name in sizes})
        if self.width % (2 * self.heads):
            raise HeadscopeError(
                f"width {self.width} is not an even number of dimensions for each of {self.heads} heads"
            )
        if self.positions not in POSITIONS:
            raise HeadscopeError(f"there are no positions {self.positions!r}; choose {', '.join(POSITIONS)}")

    @property
    def d_head(self) -> int:
        """Dimensions of a head."""
        return self.width // self.heads


class Block(nn.Module):
    """Attention and a gated MLP, each behind an RMS norm, both added to the stream."""

    def __init__(self, shape: Shape, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.before_attention, self.before_mlp = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (batch, position, width)."""
        x = x + self.attention(self.before_attention(x))
        y = self.before_mlp(x)
        wide: Tensor = self.down(silu(self.gate(y)) * self.up(y))
        return x + wide


class Decoder(nn.Module):
    """Tokens to logits. Weights are normal with deviation 0.02, those that write to the stream 0.02 / sqrt(2 layers).

    Args:
        shape: sizes, positions and mask.
        variant: an ``interp.laboratory.variants`` class.
    """

    def __init__(self, shape: Shape, variant: type[nn.Module]) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.context, shape.width) if shape.positions == "learned" else None
        self.layers = nn.ModuleList(Block(shape, variant(shape, layer)) for layer in range(shape.layers))
        self.norm, self.unembed = nn.RMSNorm(shape.width), nn.Linear(shape.width, shape.vocabulary, bias=False)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes = name.endswith((".out", ".down"))
                nn.init.normal_(module.weight, std=0.02 / ((2 * shape.layers) ** 0.5 if writes else 1))

    def forward(self, input_ids: Tensor) -> Tensor:
        """``input_ids`` (batch, position) to logits (batch, position, vocabulary)."""
        x = self.embed(input_ids)
        if self.places is not None:
            x = x + self.places(torch.arange(input_ids.shape[1], device=x.device))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.unembed(self.norm(x))
        return logits
