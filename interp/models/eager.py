"""The attention weights that a model's own eager code computes: the yardstick of tests and of the support table.

Independent of our routing: the model is switched to transformers' eager implementation and the eager functions of its
own modeling files are listened to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError

Weights = list[tuple[str, Tensor]]


@contextmanager
def eager_weights(model: nn.Module) -> Iterator[Weights]:
    """Inside the block the model attends eagerly and the list fills with (module name, weights) of every call.

    Weights have shape (batch, head, query, key): what the softmax over keys gave, a sink's share left out. The model's
    own implementations are restored at the end.

    Raises:
        HeadscopeError: the model has no eager attention.
    """
    from headscope.interp.sites.huggingface import implementation

    names = {id(module): name for name, module in model.named_modules()}
    seen: Weights = []
    before = implementation(model)
    patched: list[tuple[Any, Any]] = []
    files = {type(module).__module__ for module in model.modules()}
    try:
        for file in files:
            namespace = sys.modules[file]
            real = getattr(namespace, "eager_attention_forward", None)
            if real is not None:
                patched.append((namespace, real))
                namespace.eager_attention_forward = _listening(real, names, seen)  # type: ignore[attr-defined]
        try:
            model.set_attn_implementation("eager")  # type: ignore[operator]
        except Exception as error:
            raise HeadscopeError(f"{type(model).__name__} has no eager attention to compare with: {error}") from error
        yield seen
    finally:
        for namespace, real in patched:
            namespace.eager_attention_forward = real
        if implementation(model) != before:
            model.set_attn_implementation(before)  # type: ignore[operator]


def _listening(real: Any, names: dict[int, str], seen: Weights) -> Any:
    def listening(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = real(module, *args, **kwargs)
        if result[1] is not None:
            seen.append((names.get(id(module), "?"), result[1].detach()))
        return result

    return listening
