"""Base of the edits of attention patterns: which heads, which layers, which rows, and whether anything was found."""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites.given import ModelLike
from headscope.interp.statistics.plan import Plan
from headscope.interp.statistics.spans import members
from headscope.interventions.declared import Edit
from headscope.interventions.phases import as_mask, is_none, require_told


@dataclass(frozen=True, eq=False)
class PatternEdit(Edit):
    """Base of the edits of patterns. A subclass writes ``change``, what a layer computes with instead.

    A block in which rows were meant and none was changed ends with a warning that says why (``nothing``).

    Args:
        heads: which heads: a HeadSet, or what ``HeadSet.of`` makes one of. None: all.
        layers: which layers, by number; None: all (that hold one of ``heads``).
    """

    heads: HeadSet | None = None
    _: KW_ONLY
    layers: tuple[int, ...] | None = None

    nothing: ClassVar[str] = "no row that was meant sees the keys that are meant"

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.heads is not None:
            object.__setattr__(self, "heads", HeadSet.of(self.heads))
        if self.layers is not None:
            try:
                given = (self.layers,) if isinstance(self.layers, int) else tuple(int(x) for x in self.layers)
            except (TypeError, ValueError) as error:
                raise HeadscopeError(f"{kind}: layers must be numbers, such as (2, 3), not {self.layers!r}") from error
            object.__setattr__(self, "layers", given)
        by_layer = None if self.heads is None else self.heads.by_layer()
        if by_layer is not None and self.layers is not None:
            by_layer = {layer: mine for layer, mine in by_layer.items() if layer in self.layers}
        if self.layers == ():
            raise HeadscopeError(f"{kind}: layers is empty; name layers, or leave layers out for all")
        if by_layer == {}:
            raise HeadscopeError(f"{kind} was given no heads: name heads of its layers, or leave heads out for all")
        object.__setattr__(self, "_by_layer", by_layer)
        object.__setattr__(self, "_done", [])
        super().__post_init__()

    @property
    def neutral(self) -> bool:
        """Whether its settings are those that change nothing: layers then run the model's own attention."""
        return self.strength == 0

    def in_force(self, model: ModelLike, tower: str | None) -> PatternEdit:
        """A copy that counts, and remembers, for itself."""
        return replace(self)

    def named_layers(self) -> dict[int, str] | None:
        """The layers that it needs to attend."""
        if self.heads is not None:
            mine = super().named_layers() or {}
            return {layer: what for layer, what in mine.items() if self.holds(layer)}
        return None if self.layers is None else {layer: f"layer {layer}" for layer in self.layers}

    def with_heads(self, heads: HeadSet) -> PatternEdit:
        """The same edit of other heads; refused for an edit of all heads, which has no random-head control."""
        if self.heads is None:
            raise HeadscopeError(f"{self.name} is not driven by a head set, so it has no random-head control")
        return self.for_its_model(replace(self, heads=heads))

    def holds(self, layer: int) -> bool:
        """Whether it is of this layer."""
        by_layer: dict[int, list[int]] | None = vars(self)["_by_layer"]
        return layer in by_layer if by_layer is not None else self.layers is None or layer in self.layers

    def concerns(self, module: str, layer: int) -> bool:
        """Its layers, unless its settings change nothing."""
        return not self.neutral and self.holds(layer)

    def edit(self, call: AttentionCall) -> AttentionCall:
        """``change`` where rows of this layer are meant now."""
        if not self.concerns(call.module, call.layer):
            return call
        rows = self.rows(call)
        if is_none(rows):
            return call
        mine = self._heads(call)[None, :, None] & as_mask(rows, call)[:, None]
        return self.change(call, mine)

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """What the layer computes with instead; ``mine`` bool (batch or 1, head, query) are the rows that are meant."""
        raise NotImplementedError

    def note(self, done: Tensor) -> None:
        """Keep whether a change met anything, ``done`` being bool of any shape."""
        held: list[Tensor] = vars(self)["_done"]
        held[:] = [done.any() if not held else held[0].to(done.device) | done.any()]

    def finish(self) -> None:
        """Say so where no row was meant, or nothing was changed in those that were."""
        super().finish()
        held: list[Tensor] = vars(self)["_done"]
        if self._meant and bool(self._meant[0]) and not (held and bool(held[0])):
            warnings.warn(f"{self.name} changed nothing in this block: {self.nothing}", UserWarning, stacklevel=2)

    def _heads(self, call: AttentionCall) -> Tensor:
        by_layer: dict[int, list[int]] | None = vars(self)["_by_layer"]
        count, device = call.query.shape[1], call.query.device
        if by_layer is None:
            return torch.ones(count, dtype=torch.bool, device=device)
        mine = torch.zeros(count, dtype=torch.bool, device=device)
        mine[torch.tensor(by_layer[call.layer], device=device)] = True
        return mine

    def keys(self, call: AttentionCall, span: Any, what: str) -> Tensor:
        """The keys of ``call`` that a span holds: bool (batch or 1, key).

        Raises:
            HeadscopeError: no such span, or keys whose positions cannot be told.
        """
        require_told(call, f"the positions of {what}")
        return members(span, Plan(call).key_positions, call.query.shape[0])
