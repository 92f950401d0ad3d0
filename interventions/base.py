"""What every intervention is: a handler with a name, a description and, where it is head-driven, a head set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from headscope.interp.attention import Handler, bare_model
from headscope.interp.errors import HeadscopeError
from headscope.interp.headset import HeadSet
from headscope.interp.sites import attached
from headscope.interp.verify import verify_once


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


@contextmanager
def apply(model: Any, *interventions: Intervention) -> Iterator[None]:
    """Put ``interventions`` in force, in order, for every forward pass and ``generate`` inside the block.

    Composes with ``trace`` (a tracer entered later sees the edited model) and with itself. The model is as it was after
    the block, also after an exception.

    Raises:
        HeadscopeError: an architecture that cannot be edited exactly, or a head that does not exist.
    """
    config = bare_model(model).config.get_text_config()
    for intervention in interventions:
        intervention.check(config.num_hidden_layers, config.num_attention_heads)
    verify_once(model)
    with ExitStack() as stack:
        for intervention in interventions:
            stack.enter_context(attached(model, intervention))
        stack.enter_context(torch.no_grad())
        yield
