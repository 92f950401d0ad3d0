"""The attention weights that a model's own eager code computes: the yardstick of tests and of the support table.

Independent of our routing: the model is switched to transformers' eager implementation and the eager functions of its
own modeling files are listened to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.compiled import uncompiled

Weights = list[tuple[str, Tensor]]


@contextmanager
def eager_weights(model: nn.Module) -> Iterator[Weights]:
    """Inside the block the model attends eagerly and the list fills with (module name, weights) of every call.

    Weights have shape (batch, head, query, key): what every key's value is multiplied by, a sink's share left out. The
    model's own implementations are restored at the end.

    Raises:
        HeadscopeError: the model has no eager attention.
    """
    from headscope.interp.sites.huggingface.switch import implementation

    names = {id(module): name for name, module in model.named_modules()}
    seen: Weights = []
    before = implementation(model)
    patched: list[tuple[Any, str, Any]] = []
    files = {type(module).__module__ for module in model.modules()}
    try:
        for file in files:
            namespace = sys.modules[file]
            for name in [name for name in vars(namespace) if "eager" in name and name.endswith("attention_forward")]:
                real = getattr(namespace, name)
                patched.append((namespace, name, real))
                setattr(namespace, name, _listening(real, names, seen))
        try:
            model.set_attn_implementation("eager")  # type: ignore[operator]
        except Exception as error:
            raise HeadscopeError(f"{type(model).__name__} has no eager attention to compare with: {error}") from error
        with uncompiled():
            yield seen
    finally:
        for namespace, name, real in patched:
            setattr(namespace, name, real)
        if implementation(model) != before:
            model.set_attn_implementation(before)  # type: ignore[operator]


def _listening(real: Any, names: dict[int, str], seen: Weights) -> Any:
    def listening(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        # what the values are really multiplied by: some functions scale the output after the weights they return
        unit = torch.eye(key.shape[2], dtype=value.dtype, device=value.device).expand(*key.shape[:2], -1, -1)
        applied = real(module, query, key, unit, *args, **kwargs)[0].transpose(1, 2)
        seen.append((names.get(id(module), "?"), applied.detach()))
        return real(module, query, key, value, *args, **kwargs)

    return listening
