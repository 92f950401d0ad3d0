"""StreamCall: the residual stream, or what a layer writes to it, at one place of one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError

PLACES = ("resid_pre", "attn_out", "resid_mid", "cross_attn_out", "mlp_out", "resid_post")
NEURONS = ("mlp_post", "mlp_down")  # inside an MLP: (batch, position, neuron), and what these write, before any norm


@dataclass(frozen=True, eq=False)
class StreamCall:
    """What passes one place of a layer in one forward pass: ``x`` (batch, position, d_model).

    ``place``, as TransformerLens names it: ``"resid_pre"`` and ``"resid_post"`` enter and leave the layer;
    ``"attn_out"`` (self-attention), ``"cross_attn_out"`` and ``"mlp_out"`` are what is added in between, after any norm
    of it, so that the stream is their sum; ``"resid_mid"`` is the stream after ``"attn_out"``. ``"mlp_post"`` is no
    part of the stream: ``x`` (batch, position, neuron) are the MLP's activations, which its last projection takes (for
    a gated MLP the product with the gate), and ``"mlp_down"`` what that projection gives, before any norm.
    ``layer`` and ``module`` (the layers' pattern of names) are those of the tower; ``offset`` positions came before in
    a cache.
    """

    place: str
    layer: int
    module: str
    x: Tensor
    offset: int
    where: Callable[[Tensor], Tensor]

    @property
    def position(self) -> Tensor:
        """Positions (batch, position) from each example's first real token; -1 is padding.

        Raises:
            HeadscopeError: the pass was given a mask that does not say where its examples begin.
        """
        return self.where(self.x)

    def rows(self, positions: Sequence[int]) -> Tensor:
        """The rows (batch, n) of ``x`` at positions from each example's first real token, or from its end if negative.

        Raises:
            HeadscopeError: an example does not have such a position in this pass.
        """
        at = self.position
        wanted = torch.tensor(positions, device=at.device)
        wanted = torch.where(wanted < 0, at.amax(1, keepdim=True) + 1 + wanted, wanted.expand(at.shape[0], -1))
        found = (at[:, None] == wanted[:, :, None]) & (wanted[:, :, None] >= 0)
        if not bool(found.any(-1).all()):
            raise HeadscopeError(f"positions {list(positions)} do not all exist in a pass of this length")
        return found.int().argmax(-1)
