"""Edits of chosen heads: a subclass writes one method, what the heads give instead or what the layer computes with."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites.given import ModelLike
from headscope.interventions.declared import Edit
from headscope.interventions.phases import as_mask, is_every, is_none


@dataclass(frozen=True, eq=False)
class HeadEdit(Edit):
    """Base of the edits of chosen heads. A subclass is a frozen dataclass that writes one of two methods:

    - ``write(call, z, heads)``: what the heads give instead of ``z``, in its precision or a wider one. The base moves
      ``z`` there by ``strength``, on the rows that are meant.
    - ``change(call, heads)``: what the layer computes with instead. It minds ``self.strength`` and
      ``self.head_rows(call)`` itself.

    Args:
        heads: a HeadSet, or what ``HeadSet.of`` makes one of: (layer, head) pairs, ``"L18H6,L17H3"``.
    """

    heads: HeadSet = field()

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", HeadSet.of(self.heads))
        object.__setattr__(self, "_layers", self.heads.by_layer())
        object.__setattr__(self, "_indices", {})
        if not len(self.heads):
            raise HeadscopeError(f"{type(self).__name__} was given no heads")
        super().__post_init__()

    def with_heads(self, heads: HeadSet) -> HeadEdit:
        """The same edit of other heads."""
        return self.for_its_model(replace(self, heads=heads))

    def in_force(self, model: ModelLike, tower: str | None) -> HeadEdit:
        """A copy that counts for itself, and shares what it made of tables."""
        made = copy(self)
        object.__setattr__(made, "_met", [])
        return made

    def concerns(self, module: str, layer: int) -> bool:
        """The layers that hold a head of the set."""
        return layer in self._held and super().concerns(module, layer)

    def edit(self, call: AttentionCall) -> AttentionCall:
        """``change`` where a head of this layer is meant now."""
        heads = self._held.get(call.layer)
        if heads is None or not self.strength or type(self).change is HeadEdit.change or is_none(self.rows(call)):
            return call
        return self.change(call, heads)

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """``write``, by ``strength``, on the rows that are meant now."""
        heads = self._held.get(call.layer)
        if heads is None or not self.strength or type(self).write is HeadEdit.write:
            return z
        rows = self.rows(call)
        if is_none(rows):
            return z
        index = self._index(call)
        old = z.index_select(1, index)
        new = self.write(call, old, heads)
        if new is None:
            return z
        if self.strength != 1:
            new = old + self.strength * (new - old)
        new = new.to(old.dtype)  # last: in half precision a small change, many times over, would be lost in ``new``
        if not is_every(rows, call):
            new = torch.where(as_mask(rows, call)[:, None, :, None], new, old)
        return z.index_copy(1, index, new)

    def change(self, call: AttentionCall, heads: list[int]) -> AttentionCall:
        """What the layer computes with instead; ``heads`` of it are meant."""
        return call

    def write(self, call: AttentionCall, z: Tensor, heads: list[int]) -> Tensor | None:
        """What ``heads`` give instead of ``z`` (batch, chosen head, query, d_value); None: what they give."""
        return None

    def head_rows(self, call: AttentionCall) -> Tensor:
        """Which (head, query) pairs of ``call`` are meant: bool (batch or 1, head, query)."""
        mine = torch.zeros(call.query.shape[1], dtype=torch.bool, device=call.query.device)
        mine[self._index(call)] = True
        return mine[None, :, None] & as_mask(self.rows(call), call)[:, None]

    @property
    def _held(self) -> Mapping[int, list[int]]:
        layers: dict[int, list[int]] = vars(self)["_layers"]
        return layers

    def _index(self, call: AttentionCall) -> Tensor:
        """The heads of this layer as a tensor on its device, made once."""
        made: dict[Any, Tensor] = vars(self)["_indices"]
        key = call.layer, call.query.device
        if key not in made:
            made[key] = torch.tensor(self._held[call.layer], device=call.query.device)
        return made[key]

    def matrices(self, layer: int, width: int) -> tuple[Tensor, Tensor] | None:
        """M (chosen head, width, width) and b (chosen head, width), float64, where at full strength all that it does to
        a head's z is M z + b, in ``layer``'s order of heads; None where it is no such map. ``headscope export`` bakes
        it into the output projection."""
        return None
