"""What every intervention is: a handler with a name, a description and, where it is head-driven, a head set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites import attached, verify_once
from headscope.interp.sites.huggingface.route import Route, modules_of, places
from headscope.interp.sites.huggingface.switch import implementations
from headscope.interp.sites.towers import check_name, default_tower, selects
from headscope.interp.sites.unwrap import bare_model, origin
from headscope.kernels.request import Reduced, Request


class Intervention(Handler):
    """An edit of attention or of head outputs, in force inside ``with apply(model, intervention)``.

    ``heads`` is the head set that drives it, or None. ``with_heads`` makes the same edit on other heads, which is what
    a matched random control is.
    """

    name: str = "intervention"
    heads: HeadSet | None = None

    def with_heads(self, heads: HeadSet) -> Intervention:
        """The same edit driven by other heads."""
        raise HeadscopeError(f"{self.name} is not driven by a head set, so it has no random-head control")

    def describe(self) -> dict[str, Any]:
        """Everything that decides what it does, JSON-able, for provenance and for resuming."""
        return {"name": self.name, "heads": None if self.heads is None else list(self.heads)}

    def check(self, layers: int, heads: int) -> None:
        """Raise HeadscopeError where it cannot apply to a model of this size."""
        if self.heads is not None:
            self.heads.check(layers, heads)


def size(model: Any) -> tuple[int, int]:
    """Layers of the tower that reads or writes text, and query heads a layer."""
    config: Any = bare_model(model).config
    text = config.get_text_config()
    return int(text.num_hidden_layers), int(text.num_attention_heads)


class _InTower(Handler):
    """``inner`` where one tower attends: head (0, 0) of a vision tower is another head than the text's.

    A head that does not exist is refused at the first call, where the number of heads is seen.
    """

    def __init__(self, inner: Intervention, model: nn.Module, tower: str, layers: int) -> None:
        self.inner, self.model, self.tower, self.layers = inner, model, tower, layers
        self._checked = False

    def _is_here(self, call: AttentionCall) -> bool:
        here = selects(self.tower, call.module, self.model)
        if here and not self._checked:
            self.inner.check(self.layers, call.query.shape[1])
            self._checked = True
        return here

    def concerns(self, module: str, layer: int) -> bool:
        return selects(self.tower, module, self.model) and self.inner.concerns(module, layer)

    def edit(self, call: AttentionCall) -> AttentionCall:
        return self.inner.edit(call) if self._is_here(call) else call

    def request(self, call: AttentionCall) -> Request | None:
        return self.inner.request(call) if self._is_here(call) else None

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        return self.inner.edit_output(call, z) if self._is_here(call) else z

    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        self.inner.observe(call, reduced)

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        self.inner.begin_forward(inputs)

    def end_forward(self) -> None:
        self.inner.end_forward()

    def abort_forward(self) -> None:
        self.inner.abort_forward()


@contextmanager
def apply(model: Any, *interventions: Intervention, tower: str | None = None) -> Iterator[None]:
    """Put ``interventions`` in force, in order, for every forward pass and ``generate`` inside the block.

    Composes with ``trace`` (a tracer entered later sees the edited model) and with itself, so that each tower can have
    edits of its own. The model is as it was after the block, also after an exception.

    Args:
        model: load_model's result, a Hugging Face model, a TransformerBridge or an nnsight wrapper (around its
            ``trace`` and ``generate``).
        interventions: edits, e.g. ``AblateHeads``.
        tower: whose heads they name where a model has several towers, as in ``trace(tower=...)``: ``"language"``,
            ``"vision"``, ``"encoder"``, ``"cross"`` ... or a pattern of module names. None: the tower that reads or
            writes text.

    Raises:
        HeadscopeError: an architecture that cannot be edited exactly, or a head that does not exist.
    """
    inner = bare_model(model)
    if tower is None:
        chosen, layers, heads = default_tower(modules_of(inner), inner), *size(model)
        for intervention in interventions:
            intervention.check(layers, heads)
    else:
        chosen, layers = tower, layers_of(model, tower)
        for intervention in interventions:
            _check_layers(intervention, layers, tower)
    verify_once(model)
    with ExitStack() as stack:
        for intervention in interventions:
            stack.enter_context(attached(model, _InTower(intervention, inner, chosen, layers)))
        stack.enter_context(torch.no_grad())
        yield


def layers_of(model: Any, tower: str) -> int:
    """How many layers attend in a tower.

    Raises:
        HeadscopeError: ``tower`` is no name of one or of modules, or nothing that can be edited attends there.
    """
    inner = bare_model(model)
    if origin(model) == "transformer_lens" and tower != "language":
        raise HeadscopeError(f"a TransformerBridge shows its language layers only, not {tower!r}; edit the bare model")
    check_name(tower, modules_of(inner))
    parts = places(Route(inner, implementations(inner))).values()
    layers = {part.layer for part in parts if "att" in part.module.lower() and selects(tower, part.module, inner)}
    if not layers:
        raise HeadscopeError(f"{type(inner).__name__} has no attention layer in {tower!r}")
    return 1 + max(layers)


def _check_layers(intervention: Intervention, layers: int, tower: str) -> None:
    missing = [layer for layer in (intervention.heads or HeadSet(())).by_layer() if not 0 <= layer < layers]
    if missing:
        raise HeadscopeError(f"layer {missing[0]} does not exist in {tower!r}, which has layers 0-{layers - 1}")
