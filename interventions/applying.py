"""Putting interventions in force: ``with apply(model, edit)``, in the tower that they name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from headscope.interp.sites.towers import TOWERS, check_name, default_tower, selects, tower_of
from headscope.interp.sites.unwrap import bare_model, origin
from headscope.interp.tracing.generation import GenerationBoundary, watching_generate
from headscope.interventions.base import Intervention
from headscope.interventions.files import require_model
from headscope.kernels.request import Reduced, Request


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
    _check_phases(interventions, chosen if chosen in TOWERS else tower_of(chosen, inner))
    for intervention in interventions:
        require_model(intervention.made_for, model, intervention.name)
    verify_once(model)
    with ExitStack() as stack:
        if any(intervention.phased for intervention in interventions):
            stack.enter_context(watching_generate(model, GenerationBoundary(), recorded=False))
        for intervention in interventions:
            stack.enter_context(attached(model, _InTower(intervention, inner, chosen, layers)))
        stack.enter_context(torch.no_grad())
        yield


def _check_phases(interventions: Sequence[Intervention], tower: str) -> None:
    if tower in ("vision", "audio", "encoder", "connector") and any(edit.phased for edit in interventions):
        raise HeadscopeError(f"the {tower} tower reads its input at once and writes no text; use during='always'")


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
