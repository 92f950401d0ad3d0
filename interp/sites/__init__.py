"""Sites: where attention calls come from. ``attached`` picks the site for what it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from headscope.interp.attention.handler import Handler
from headscope.interp.sites import modules
from headscope.interp.sites.agreement import Verification
from headscope.interp.sites.attachment import Attachment, Layers
from headscope.interp.sites.compiled import uncompiled
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.gradients import gradients
from headscope.interp.sites.huggingface import route as huggingface
from headscope.interp.sites.huggingface import verify as hf_verify
from headscope.interp.sites.interrupts import block
from headscope.interp.sites.stream import streaming
from headscope.interp.sites.unwrap import origin, require_model, shown

OWN_CHECKS = ("transformer_lens", "headscope")  # origins whose sites verify on their own

__all__ = ["attached", "handlers_on", "is_attached", "verify", "verify_once"]


@block
def attached(
    model: ModelLike,
    handler: Handler,
    *,
    tower: str | None = None,
    layers: Layers | None = None,
    verify: bool = True,
    grad: bool = False,
) -> Iterator[Any]:
    """Show ``handler`` the attention calls of one tower of ``model`` inside the block; nothing of ours stays after it.

    TransformerLens and nnsight are imported only for objects of theirs. What torch.compile compiled runs uncompiled
    inside the block (``headscope.interp.sites.compiled`` says why).

    Args:
        model: what ``load_model`` returns, a Hugging Face module, a TransformerLens ``TransformerBridge``, or an
            nnsight wrapper.
        handler: a tracer, an edit, or a ``Handler`` of your own.
        tower: a name of ``headscope.interp.sites.towers.TOWERS``, a pattern of module names, or ``"all"``. None: the
            tower that reads or writes text.
        layers: show these alone (all by default), perhaps with what an error calls each of them. None of them and no
            stream: the model runs what it ran before.
        verify: check once per model that our attention equals the model's own.
        grad: keep what a backward pass needs. Outputs carry gradients, also through edits; statistics do not. A
            handler may keep the ``z`` of ``edit_output`` for dL/dz.

    Raises:
        HeadscopeError: an architecture or an object that cannot be traced exactly; no such tower; a layer that does not
            attend in it or, when the block ends without another exception, attended in no finished forward pass.
    """
    require_model(model)
    attachment = Attachment(model, handler, tower, layers)
    if attachment.rests:
        with gradients(model, on=grad):
            yield None
        return
    if verify:
        verify_once(model)
    with (
        gradients(model, on=grad),
        uncompiled(),
        _site(model).attached(shown(model), attachment) as route,
        streaming(model, attachment),
    ):
        yield route
    attachment.finish()


def handlers_on(model: ModelLike) -> list[tuple[Handler, str]]:
    """The handlers that are attached to a model now, in order of entry, and the tower of each."""
    with attached(model, Handler(), verify=False) as route:
        return [(each.inner, each.size.tower) for each in route.handlers[:-1] if isinstance(each, Attachment)]


def verify_once(model: ModelLike) -> Verification:
    """Verify a model the first time it is seen; afterwards return what was found.

    Raises:
        HeadscopeError: the model does not route its attention, or disagrees; the message names the layer.
    """
    if origin(model) in OWN_CHECKS:
        with uncompiled():
            found: Verification = _site(model).verify_once(shown(model))
        return found
    return hf_verify.verify_once(model)


def verify(model: ModelLike, inputs: dict[str, Any] | None = None, trust: Sequence[str] = ()) -> Verification:
    """Check that our attention is the model's own, on ``inputs`` (default: a small padded batch of random tokens).

    ``trust`` names attention implementations whose functions are your own (registered, or put in the place of
    transformers') and softmax attention at every length and with every cache; without it such a layer's outputs may be
    edited, and nothing else, because nothing stands in for a function that may do more beyond what a check tries.

    Raises:
        HeadscopeError: the architecture is not routed, or does not run on inputs of ours (give ``inputs`` then).
    """
    if origin(model) in OWN_CHECKS:
        with uncompiled():
            found: Verification = _site(model).verify(shown(model), inputs)
        return found
    return hf_verify.verify(model, inputs, trust)


def is_attached(model: ModelLike) -> bool:
    """Whether anything of ours is on the model now."""
    found: bool = _site(model).is_attached(shown(model))
    return found


def _site(model: ModelLike) -> Any:
    if origin(model) == "transformer_lens":
        from headscope.interp.sites.transformer_lens import route as transformer_lens

        return transformer_lens
    if origin(model) == "headscope":
        return modules
    return huggingface  # an nnsight wrapper runs the Hugging Face module it holds
