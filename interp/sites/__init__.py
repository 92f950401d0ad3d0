"""Sites: where attention calls come from. ``attached`` picks the site for what it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from headscope.interp.attention.handler import Handler
from headscope.interp.sites.agreement import Verification
from headscope.interp.sites.compiled import plain, uncompiled
from headscope.interp.sites.huggingface import route as huggingface
from headscope.interp.sites.huggingface import verify as hf_verify
from headscope.interp.sites.interrupts import block
from headscope.interp.sites.unwrap import origin

__all__ = ["attached", "is_attached", "verify", "verify_once"]


@block
def attached(model: Any, handler: Handler) -> Iterator[Any]:
    """Have ``handler`` see every attention call of ``model`` inside the block; nothing of ours stays after it.

    ``model``: what ``load_model`` returns, a Hugging Face module, a TransformerLens ``TransformerBridge``, or an
    nnsight wrapper. TransformerLens and nnsight are imported only for objects of theirs. What torch.compile compiled
    runs uncompiled inside the block (``headscope.interp.sites.compiled`` says why).

    Raises:
        HeadscopeError: an architecture or an object that cannot be traced exactly.
    """
    with uncompiled(), _site(model).attached(plain(model), handler) as route:
        yield route


def verify_once(model: Any) -> Verification:
    """Verify a model the first time it is seen; afterwards return what was found.

    Raises:
        HeadscopeError: the model does not route its attention, or disagrees; the message names the layer.
    """
    if origin(model) == "transformer_lens":
        with uncompiled():
            found: Verification = _site(model).verify_once(plain(model))
        return found
    return hf_verify.verify_once(model)


def verify(model: Any, inputs: dict[str, Any] | None = None, trust: Sequence[str] = ()) -> Verification:
    """Check that our attention is the model's own, on ``inputs`` (default: a small padded batch of random tokens).

    ``trust`` names attention implementations whose functions are your own (registered, or put in the place of
    transformers') and softmax attention at every length and with every cache; without it such a layer's outputs may be
    edited, and nothing else, because nothing stands in for a function that may do more beyond what a check tries.

    Raises:
        HeadscopeError: the architecture is not routed, or does not run on inputs of ours (give ``inputs`` then).
    """
    if origin(model) == "transformer_lens":
        with uncompiled():
            found: Verification = _site(model).verify(plain(model), inputs)
        return found
    return hf_verify.verify(model, inputs, trust)


def is_attached(model: Any) -> bool:
    """Whether anything of ours is on the model now."""
    found: bool = _site(model).is_attached(plain(model))
    return found


def _site(model: Any) -> Any:
    if origin(model) == "transformer_lens":
        from headscope.interp.sites.transformer_lens import route as transformer_lens

        return transformer_lens
    return huggingface  # an nnsight wrapper runs the Hugging Face module it holds
