"""Handlers: what a tracer or an edit does at an attention call, and how a call is answered under several of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.stream import StreamCall
from headscope.kernels.request import Reduced, Request


class Handler:
    """What a tracer or an intervention does at each attention call. Every method has a default that does nothing.

    A site runs, for handlers in the order they were entered: every ``edit``, then the attention itself with the
    handlers' ``request``s in the same pass, then every ``edit_output``, then every ``observe``. A tracer therefore sees
    the edited attention and the edited outputs.

    It is shown the calls of the tower and layers that it is attached to. ``follows`` names other towers whose calls
    ``follow`` is shown as well, after their edits; ``streams`` names places of the residual stream
    (``headscope.interp.attention.stream.PLACES``) or of MLPs (``NEURONS``) that ``stream`` is shown. ``only_reads``: it
    changes nothing, so that what a backward pass computes again (gradient checkpointing) is no concern of it.
    """

    follows: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    only_reads = False

    def check(self, layers: int, heads: int) -> None:
        """Raise HeadscopeError where it cannot apply to a tower of ``layers`` layers of ``heads`` query heads."""

    def concerns(self, module: str, layer: int) -> bool:
        """Whether this layer's calls are read or changed at all, the same answer while attached.

        Where no handler is concerned, a site may leave the layer to the model's own attention and call none of them.
        """
        return True

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Change what the layer computes with."""
        return call

    def request(self, call: AttentionCall) -> Request | None:
        """The statistics wanted of this call, or None."""
        return None

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """Change the heads' outputs ``z`` (batch, head, query, d_value); return a new tensor or ``z`` itself."""
        return z

    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        """Read the statistics asked for by ``request``; ``reduced.output`` holds the final heads' outputs."""

    def follow(self, call: AttentionCall) -> None:
        """See a call of another tower, one of ``follows``."""

    def stream(self, call: StreamCall) -> Tensor:
        """Read or change the residual stream ``call.x`` at one of ``streams``; return a new tensor or ``x`` itself."""
        return call.x

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        """The model is about to run a forward pass on these keyword arguments."""

    def fill_cache(self, cache: Any) -> None:
        """The forward pass that comes to its end leaves its keys in this cache, which the model may have made."""

    def end_forward(self) -> None:
        """The forward pass that began came to its end."""

    def abort_forward(self) -> None:
        """The forward pass that began did not come to its end (an exception, an interrupt)."""

    def finish(self) -> None:
        """The block in which it was attached comes to its end, without an exception."""


def run_call(call: AttentionCall, handlers: list[Handler]) -> Tensor:
    """One attention call under ``handlers``: edits, attention with statistics, output edits, observation."""
    return finish_call(edit_call(call, handlers), handlers)


def edit_call(call: AttentionCall, handlers: list[Handler]) -> AttentionCall:
    """``call`` after every handler's ``edit``, in order."""
    for handler in handlers:
        call = handler.edit(call)
    return call


def finish_call(call: AttentionCall, handlers: list[Handler], z: Tensor | None = None) -> Tensor:
    """Attention with statistics, output edits and observation of an edited call.

    ``z`` (batch, head, query, d_value) is what the call gives where the site has computed it already.
    """
    results: list[tuple[Handler, Reduced]] = []
    for handler in handlers:
        request = handler.request(call)
        if request is not None:
            result = call.attend(request if request.output == (z is None) else replace(request, output=z is None))
            z = result.output if z is None else z
            results.append((handler, result))
    if z is None:
        z = call.output()
    for handler in handlers:
        z = handler.edit_output(call, z)
    for handler, reduced in results:
        reduced.output = z
        handler.observe(call, reduced)
    return z
