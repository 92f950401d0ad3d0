"""What every intervention is: a handler with a name, a description and, where it is head-driven, a head set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.attention import AttentionCall, Handler, bare_model
from headscope.interp.errors import HeadscopeError
from headscope.interp.headset import HeadSet
from headscope.interp.sites import attached
from headscope.interp.sites.huggingface import sites_of
from headscope.interp.sites.towers import default_tower, selects
from headscope.interp.verify import verify_once
from headscope.kernels.request import Attended, Request


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


class _InTextTower(Handler):
    """``inner`` where the tower that reads or writes text attends: head (0, 0) of a vision tower is another head."""

    def __init__(self, inner: Handler, model: nn.Module) -> None:
        self.inner, self.model = inner, model
        self.tower = default_tower(sites_of(model), model)

    def _is_here(self, call: AttentionCall) -> bool:
        return selects(self.tower, call.site, self.model)

    def concerns(self, site: str, layer: int) -> bool:
        return selects(self.tower, site, self.model) and self.inner.concerns(site, layer)

    def edit(self, call: AttentionCall) -> AttentionCall:
        return self.inner.edit(call) if self._is_here(call) else call

    def request(self, call: AttentionCall) -> Request | None:
        return self.inner.request(call) if self._is_here(call) else None

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        return self.inner.edit_output(call, z) if self._is_here(call) else z

    def observe(self, call: AttentionCall, attended: Attended) -> None:
        self.inner.observe(call, attended)

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        self.inner.begin_forward(inputs)

    def end_forward(self) -> None:
        self.inner.end_forward()

    def abort_forward(self) -> None:
        self.inner.abort_forward()


@contextmanager
def apply(model: Any, *interventions: Intervention) -> Iterator[None]:
    """Put ``interventions`` in force, in order, for every forward pass and ``generate`` inside the block.

    Edits are of the tower that reads or writes text, where a model has several. Composes with ``trace`` (a tracer
    entered later sees the edited model) and with itself. The model is as it was after the block, also after an
    exception.

    Raises:
        HeadscopeError: an architecture that cannot be edited exactly, or a head that does not exist.
    """
    layers, heads = size(model)
    for intervention in interventions:
        intervention.check(layers, heads)
    verify_once(model)
    with ExitStack() as stack:
        for intervention in interventions:
            stack.enter_context(attached(model, _InTextTower(intervention, bare_model(model))))
        stack.enter_context(torch.no_grad())
        yield
