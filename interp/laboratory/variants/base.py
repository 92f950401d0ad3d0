"""What attention variants share: projections, positions and the mask."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.module import AttentionModule
from headscope.interp.errors import HeadscopeError
from headscope.interp.laboratory.decoder import Shape
from headscope.interp.sites.rotary import Rotation
from headscope.kernels import reference
from headscope.kernels.score_edits import ScoreEdit, distance_slope

BASE = 10_000.0  # of RoPE


class Variant(AttentionModule):
    """Base of the variants: a subclass writes ``mix``, which makes the heads' outputs by one or more calls of ``see``.

    Class variables: ``name``, as in the registry; ``source``; ``maps``, how many patterns a head has (2 where one is
    taken from another: a tracer then shows both, head by head); ``width_of``, the query and key dimensions and the
    value dimensions of a head, as multiples of ``Shape.d_head``; ``both_ways``: it reads what follows too, and takes a
    shape whose mask is full.

    Raises:
        HeadscopeError: queries and keys of an odd number of dimensions, which RoPE cannot turn.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    maps: ClassVar[int] = 1
    width_of: ClassVar[tuple[float, float]] = (1, 1)
    both_ways: ClassVar[bool] = False
    q: nn.Module
    k: nn.Module
    frequencies: Tensor
    slopes: Tensor

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape.heads * self.maps, layer)
        self.shape = shape
        self.d_head, self.d_value = (int(times * shape.d_head) for times in self.width_of)
        if self.d_head % 2 and shape.positions == "rope":
            raise HeadscopeError(
                f"{self.name} takes {self.d_head} of a head's {shape.d_head} dimensions: RoPE cannot turn an odd number"
            )
        self.q, self.k = (nn.Linear(shape.width, shape.heads * self.maps * self.d_head, bias=False) for _ in range(2))
        self.v = nn.Linear(shape.width, shape.heads * self.d_value, bias=False)
        self.out = nn.Linear(shape.heads * self.d_value, shape.width, bias=False)
        at = torch.arange(0, self.d_head, 2) / self.d_head
        self.register_buffer("frequencies", BASE**-at, persistent=False)
        slopes = 2.0 ** (-8.0 * torch.arange(1, shape.heads + 1) / shape.heads)
        self.register_buffer("slopes", slopes.repeat_interleave(self.maps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the stream: ``x`` (batch, position, width), normed."""
        q, k = self.looks(x)
        z = self.mix(q, k, self.split(self.v(x), self.d_value), x)
        added: Tensor = self.out(z.transpose(1, 2).flatten(2))  # heads stand one after the other
        return added

    def looks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, (batch, head * maps, position, d_head) each: projected, and turned where positions are
        RoPE's."""
        return self.turned(self.split(self.q(x), self.d_head)), self.turned(self.split(self.k(x), self.d_head))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """The heads' outputs (batch, head, query, d_value).

        Args:
            q, k: (batch, head * maps, position, d_head), turned where positions are RoPE's; the maps of a head stand
                beside each other.
            v: (batch, head, position, d_value).
            x: the layer's input (batch, position, width), for whatever else is made of it.
        """
        raise NotImplementedError

    def see(self, q: Tensor, k: Tensor, v: Tensor, edit: ScoreEdit | None = None, **more: Any) -> Tensor:
        """One attention call, with ALiBi's slopes where positions are ALiBi's; ``edit`` acts on the scores after them.
        Further arguments are those of ``attend``: ``scale`` and ``mask`` in place of the layer's own, ``sinks`` ..."""
        return self.attend(q, k, v, **self.scored(edit, **more))

    def scored(self, edit: ScoreEdit | None, **more: Any) -> dict[str, Any]:
        """How the layer's scores are made: mask, scale and edit, ``more`` in their place."""
        if self.shape.positions == "alibi":
            slope = distance_slope(self.slopes)
            edit = slope if edit is None else slope.then(edit)
        return {"mask": self.shape.mask, "scale": self.d_head**-0.5, "score_edit": edit} | more

    def scores(self, q: Tensor, k: Tensor, edit: ScoreEdit | None = None, **more: Any) -> Tensor:
        """The scores that ``see`` takes, with a gradient: (batch, head, query, key) at once, -inf where hidden."""
        call = AttentionCall(q, k, k, layer=self.layer_idx, module=self.where, **self.scored(edit, **more))
        return reference.dense_scores(call.inputs())

    def split(self, x: Tensor, width: int) -> Tensor:
        """(batch, position, n * width) to (batch, n, position, width)."""
        return x.reshape(*x.shape[:-1], -1, width).transpose(1, 2)

    def turned(self, x: Tensor) -> Tensor:
        """RoPE, in two halves as transformers has it."""
        if self.shape.positions != "rope":
            return x
        rotation = Rotation(self.frequencies)
        at = torch.arange(x.shape[2], device=x.device)
        return rotation.turn(x, rotation.angles(at))


def check_causal(variant: Variant) -> None:
    """Refuse a shape whose mask is not plainly causal, for a variant that takes blocks before the query as whole."""
    if not variant.shape.mask.is_plain_causal:
        raise HeadscopeError(f"{variant.name} reads whole blocks of what was before: give Shape(mask=Mask.causal())")
