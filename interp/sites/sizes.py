"""How many layers a tower has, which of them attend and with how many heads, read from the modules that attend.

A configuration says one number for a model of several towers, and counts layers without softmax attention. A module
attends where its ``forward`` takes transformers' attention interface, or where it is an ``AttentionModule``.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from headscope.interp.attention.module import AttentionModule
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.towers import TOWERS, check_name, default_tower, modules_of, numbered, selects
from headscope.interp.sites.unwrap import bare_model, origin, shown

_INTERFACE = {"attention_interface", "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"}
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads")
Found = dict[str, dict[int, int | None]]  # pattern of modules -> layer -> heads
_KNOWN: WeakKeyDictionary[nn.Module, tuple[int, Found]] = WeakKeyDictionary()


@dataclass(frozen=True)
class TowerSize:
    """``depth`` layers, of which those in ``heads`` attend, with so many query heads (None: the first call shows it).

    ``heads`` is empty where the model's code does not show which modules attend.
    """

    tower: str
    depth: int
    heads: Mapping[int, int | None]

    def check_layers(self, layers: Collection[int], *, attend: bool = True) -> None:
        """Refuse layers that are not there or, where they must ``attend``, make no attention call.

        Raises:
            HeadscopeError: names the first such layer, and the layers that there are.
        """
        for layer in layers if self.heads else ():
            if not 0 <= layer < self.depth:
                raise HeadscopeError(
                    f"layer {layer} does not exist in {self.tower!r}, which has layers 0-{self.depth - 1}"
                )
            if attend and layer not in self.heads:
                raise HeadscopeError(
                    f"layer {layer} of {self.tower!r} makes no softmax attention call; these layers do: "
                    f"{runs(self.heads)}"
                )

    @property
    def most_heads(self) -> int | None:
        """The query heads of the layer that has most, or None where the first call shows it."""
        known = [count for count in self.heads.values() if count is not None]
        return max(known) if known and len(known) == len(self.heads) else None


def tower_size(model: ModelLike, tower: str | None = None) -> TowerSize:
    """The size of a tower, named as in ``trace(tower=...)``; None: the one that reads or writes text.

    Raises:
        HeadscopeError: ``tower`` is no name of one or of modules, or nothing that headscope sees attends there.
    """
    inner = bare_model(model)
    if origin(model) == "transformer_lens":
        from headscope.interp.sites.transformer_lens.bridge import require_bridge  # it needs the package

        require_bridge(shown(model))
        if tower in TOWERS and tower != "language":
            raise HeadscopeError(
                f"a TransformerBridge shows its language layers only, not {tower!r}; use the bare model"
            )
    if tower is not None:
        check_name(tower, modules_of(inner))
    found = attending(inner)
    chosen = default_tower(set(found) or modules_of(inner), inner) if tower is None else tower
    mine = {where: layers for where, layers in found.items() if selects(chosen, where, inner)}
    if found and not mine:
        raise HeadscopeError(f"{type(inner).__name__} has no attention layer in {chosen!r}")
    heads: dict[int, int | None] = {}
    for layers in mine.values():
        for layer, count in layers.items():
            heads[layer] = count if heads.get(layer, count) == count else None
    depth = max((_depth(where, layers, inner) for where, layers in mine.items()), default=0)
    return TowerSize(chosen, depth, dict(sorted(heads.items())))


def attending(model: nn.Module) -> Found:
    """The modules whose code attends through transformers' interface: pattern, layers and query heads."""
    count = sum(1 for _ in model.modules())
    known = _KNOWN.get(model)
    if known is None or known[0] != count:  # a bridge or an adapter changes what a model is made of
        found: Found = {}
        for _, module, where, layer in numbered(model):
            if _attends(type(module)):
                found.setdefault(where, {})[layer] = query_heads(module)
        known = _KNOWN[model] = count, found
    return known[1]


def runs(layers: Collection[int]) -> str:
    """Layers in words: "0-3, 7"."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _attends(kind: type[nn.Module]) -> bool:
    if issubclass(kind, AttentionModule):
        return True
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and not _INTERFACE.isdisjoint((*code.co_names, *code.co_varnames))


def query_heads(module: nn.Module) -> int | None:
    """The query heads of a module that attends, over all processes, as its configuration says; None: it does not."""
    named = [getattr(module, name, None) for name in _COUNTS]
    named.append(getattr(getattr(module, "config", None), "num_attention_heads", None))
    return next((count for count in named if isinstance(count, int)), None)


def _depth(where: str, layers: Mapping[int, int | None], model: nn.Module) -> int:
    """How many layers stand beside those that attend, attending or not."""
    if where.count("*") == 1:
        try:
            beside = model.get_submodule(where.partition(".*")[0])
        except AttributeError:
            beside = None
        if isinstance(beside, nn.ModuleList):
            return len(beside)
    return 1 + max(layers)
