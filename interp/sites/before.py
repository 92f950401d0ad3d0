"""What has to be known of a prompt before a model reads it: a function that is called before every pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.huggingface.masks import LazyMask
from headscope.interp.sites.huggingface.route import alone, is_paused
from headscope.interp.sites.interrupts import block, uninterrupted
from headscope.interp.sites.unwrap import bare_model, origin

__all__ = ["before_passes", "own_passes", "real_tokens"]


@block
def before_passes(model: ModelLike, function: Callable[[dict[str, Any]], None], who: str) -> Iterator[None]:
    """Inside the block ``function(inputs)`` is called before every forward pass of the whole model, with what the pass
    is given by name. It may run passes itself, in ``own_passes``, which are not shown to it.

    Raises:
        HeadscopeError: a TransformerBridge, whose own forward is around the model's, or an nnsight wrapper, which would
            take a pass of ours for its own; ``who`` names what needs this.
    """
    if origin(model):
        raise HeadscopeError(
            f"{who} reads a prompt before the model does, which neither a TransformerBridge nor an nnsight wrapper "
            "shows; give the model that load_model or transformers loads"
        )
    inner = bare_model(model)
    hooks: list[Any] = []
    try:
        with uninterrupted():
            hooks.append(inner.register_forward_pre_hook(_Before(function), with_kwargs=True, prepend=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def own_passes(model: ModelLike) -> Iterator[Any]:
    """The model inside, for passes without gradients that no handler of a block outside sees or changes; handlers that
    are attached inside this block do."""
    inner = bare_model(model)
    with alone(inner), torch.no_grad():
        yield inner


def real_tokens(mask: Any, ids: Tensor) -> Tensor:
    """Which tokens ``ids`` (batch, position) of a pass from the first position on are no padding, by the attention mask
    that the pass is given: with a static cache a ready-made one, or one of each kind of layer."""
    mask = next(iter(mask.values()), None) if isinstance(mask, dict) else mask
    mask = mask.arguments.get("attention_mask") if isinstance(mask, LazyMask) else mask
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.dim() == 4:  # whatever the layer, a token sees itself
        own = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        mask = own if own.dtype == torch.bool else own == 0
    real: Tensor = mask.bool()[:, : ids.shape[1]]
    return real.expand_as(ids)


class _Before:
    """The hook; in a copy of the model, or one saved to disk, it does nothing."""

    def __init__(self, function: Callable[[dict[str, Any]], None]) -> None:
        self.function = function

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_paused(model):
            return
        inputs = dict(kwargs)
        if args and "input_ids" not in inputs:
            inputs["input_ids"] = args[0]
        self.function(inputs)

    def __reduce__(self) -> Any:  # of the standard library alone, so that a saved model loads without headscope
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __deepcopy__(self, memo: Any) -> Any:
        return contextlib.nullcontext().__exit__
