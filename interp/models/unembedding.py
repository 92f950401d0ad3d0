"""From the residual stream to logits by the model's own modules, found by watching one short forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites.compiled import uncompiled
from headscope.interp.sites.unwrap import bare_model


def to_logits(lm: LanguageModel) -> Callable[[Tensor], Tensor]:
    """The final norm and the unembedding as one function of vectors (..., d_model), without a final softcap.

    Raises:
        HeadscopeError: the model has no output embedding, or no single module stands before it.
    """
    norm, head = final_modules(lm)
    weight = next(norm.parameters(), None)

    def logits(x: Tensor) -> Tensor:
        with torch.no_grad():
            there = x.to(lm.device, lm.model.dtype) if weight is None else x.to(lm.device, weight.dtype)
            found: Tensor = head(norm(there).to(lm.model.dtype))
        return found

    return logits


def final_modules(lm: LanguageModel) -> tuple[nn.Module, nn.Module]:
    """The final norm and the output embedding.

    No name is assumed: the norm is the one module that gives, in a forward of four tokens, what the output embedding
    reads.

    Raises:
        HeadscopeError: the model has no output embedding, or no single module stands before it.
    """
    model: Any = bare_model(lm)
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    gave: list[tuple[nn.Module, Tensor]] = []
    read: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is head:
            read.append(args[0])
        elif isinstance(output, Tensor) and not isinstance(module, nn.Dropout | nn.Identity):
            gave.append((module, output))

    leaves = [module for module in model.modules() if not any(module.children())]
    hooks = [leaf.register_forward_hook(keep) for leaf in leaves] if head is not None else []
    try:
        with uncompiled(), torch.no_grad():
            model(input_ids=torch.arange(1, 5, device=lm.device)[None] % lm.info.vocab_size)
    finally:
        for hook in hooks:
            hook.remove()
    norms = [module for module, x in gave if read and x.shape == read[-1].shape and torch.equal(x, read[-1])]
    if head is None or len(norms) != 1:
        raise HeadscopeError(f"{lm.name}: no single norm stands between the last layer and an output embedding")
    return norms[0], head
