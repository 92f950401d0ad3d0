"""Sites: where attention calls come from. ``attached`` picks the site for what it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headscope.interp.attention import Handler, origin
from headscope.interp.compiled import plain, uncompiled
from headscope.interp.sites import huggingface

__all__ = ["attached", "is_attached"]


@contextmanager
def attached(model: Any, handler: Handler) -> Iterator[Any]:
    """Have ``handler`` see every attention call of ``model`` inside the block; nothing of ours stays after it.

    ``model``: what ``load_model`` returns, a Hugging Face module, a TransformerLens ``TransformerBridge``, or an
    nnsight wrapper. TransformerLens and nnsight are imported only for objects of theirs. What torch.compile compiled
    runs uncompiled inside the block (``headscope.interp.compiled`` says why).

    Raises:
        HeadscopeError: an architecture or an object that cannot be traced exactly.
    """
    with uncompiled(), _site(model).attached(plain(model), handler) as route:
        yield route


def is_attached(model: Any) -> bool:
    """Whether anything of ours is on the model now."""
    found: bool = _site(model).is_attached(plain(model))
    return found


def _site(model: Any) -> Any:
    if origin(model) == "transformer_lens":
        from headscope.interp.sites import transformer_lens

        return transformer_lens
    return huggingface  # an nnsight wrapper runs the Hugging Face module it holds
