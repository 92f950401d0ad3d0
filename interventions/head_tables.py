"""Edits of chosen heads that hold tensors: vectors, numbers or samples of every head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.head_edit import HeadEdit

D_HEAD = "d_head"


@dataclass(frozen=True, eq=False)
class TableEdit(HeadEdit):
    """Base of the head edits that hold *tables*: tensors (layer, head, ...) of all heads, or (chosen head, ...) in the
    order of ``heads``.

    With a table of all heads ``with_heads`` makes the edit of other heads with what those heads have; with one of the
    chosen heads, each new head takes the numbers of the one in whose place it stands.

    A subclass names its tables, and what their further dimensions are, in ``tables``; those whose rows are vectors that
    it adds to z, in ``added``.
    """

    tables: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    added: ClassVar[tuple[str, ...]] = ()
    made_with: ClassVar[Mapping[str, str]] = {}  # table -> what makes one, for messages

    def __post_init__(self) -> None:
        super().__post_init__()
        places = {head: place for place, head in enumerate(self.heads)}
        object.__setattr__(self, "_places", places)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in self.tables and isinstance(value, Tensor):
                self._check_table(field.name)
            elif field.name in self.tables and (value is not None or field.default is MISSING):
                if not ("float" in str(field.type) and isinstance(value, int | float)):
                    held = type(value).__name__ if hasattr(value, "shape") else f"{value!r:.60}"
                    raise HeadscopeError(f"{type(self).__name__}: {field.name} must be a torch tensor, not {held}")

    def _check_table(self, name: str) -> None:
        """Refuse a tensor of another form.

        Raises:
            HeadscopeError: says which forms there are.
        """
        table, more = getattr(self, name), self.tables[name]
        forms = f"(layer, head{_more(more)}) or, in the order of heads, ({len(self.heads)}{_more(more)})"
        if not table.is_floating_point() or table.dim() - len(more) not in (1, 2) or not table.numel():
            raise HeadscopeError(
                f"{type(self).__name__}: {name} is {str(table.dtype).removeprefix('torch.')} {tuple(table.shape)}; it "
                f"has to be a floating-point tensor {forms}{self._again(name)}"
            )
        if self._by_place(name) and table.shape[0] != len(self.heads):
            raise HeadscopeError(
                f"{type(self).__name__}: {name} has rows for {table.shape[0]} heads, but {len(self.heads)} are chosen; "
                f"give {forms}{self._again(name)}"
            )
        if not bool(table.detach().isfinite().all()):
            raise HeadscopeError(f"{type(self).__name__}: {name} holds numbers that are not finite; measure it again")

    def check(self, layers: int, heads: int) -> None:
        """Raise HeadscopeError for a head the model lacks, or a table of a model of another size."""
        super().check(layers, heads)
        for name, more in self.tables.items():
            table = getattr(self, name)
            if isinstance(table, Tensor) and not self._by_place(name) and tuple(table.shape[:2]) != (layers, heads):
                raise HeadscopeError(
                    f"{name} have the shape {tuple(table.shape)}, the model needs ({layers}, {heads}{_more(more)})"
                    f"{self._again(name)}"
                )

    def table(self, name: str, call: AttentionCall) -> Tensor:
        """The rows of a table for the layer's chosen heads, in their order: (chosen head, ...), on the layer's device,
        float32 or wider.

        Raises:
            HeadscopeError: heads of another width than the layer's.
        """
        held, dtype = getattr(self, name), torch.promote_types(call.value.dtype, torch.float32)
        width = call.value.shape[3]
        if self.tables[name][-1:] == (D_HEAD,) and held.shape[-1] != width:
            raise HeadscopeError(
                f"{name} have {held.shape[-1]} dimensions a head, layer {call.layer} has {width}{self._again(name)}"
            )
        kept: dict[Any, Tensor] = vars(self)["_indices"]
        key = name, call.layer, call.value.device, dtype
        if key in kept:
            return kept[key]
        with torch.inference_mode(False):  # it may be needed for a gradient later
            found = self.rows_of(name, call.layer).to(device=call.value.device, dtype=dtype)
        if not held.requires_grad:
            kept[key] = found
        return found

    def rows_of(self, name: str, layer: int) -> Tensor:
        """The rows of a table for a layer's chosen heads as they are held: (chosen head, ...)."""
        held, heads = getattr(self, name), self._held[layer]
        places: dict[tuple[int, int], int] = vars(self)["_places"]
        rows: Tensor = held[[places[layer, head] for head in heads]] if self._by_place(name) else held[layer, heads]
        return rows

    @property
    def adds_vectors(self) -> bool:
        """Whether a table of vectors that are added is there and not all 0."""
        return any(bool(getattr(self, name).any()) for name in self._added())

    def with_random_vectors(self, rng: np.random.Generator) -> TableEdit:
        """Every vector that is added replaced by one of its norm, in a direction that is uniform on the sphere."""
        drawn: dict[str, Any] = {name: random_like(getattr(self, name), rng) for name in self._added()}
        return self.for_its_model(replace(self, **drawn))

    def _added(self) -> list[str]:
        return [name for name in self.added if getattr(self, name) is not None]

    def _by_place(self, name: str) -> bool:
        held: Tensor = getattr(self, name)
        return held.dim() == 1 + len(self.tables[name])

    def _again(self, name: str) -> str:
        return f"; make them with {self.made_with[name]} on this model" if name in self.made_with else ""


def random_like(vectors: Tensor, rng: np.random.Generator) -> Tensor:
    """Random vectors of the norms of ``vectors`` (..., width), each independent of the others."""
    norms = vectors.detach().double().norm(dim=-1, keepdim=True)
    drawn = torch.from_numpy(rng.standard_normal(tuple(vectors.shape))).to(norms.device)
    found: Tensor = drawn * (norms / drawn.norm(dim=-1, keepdim=True))
    return found.to(vectors.dtype)


def _more(names: tuple[str, ...]) -> str:
    return "".join(f", {name}" for name in names)
