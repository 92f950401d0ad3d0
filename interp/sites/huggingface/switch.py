"""Switching a model to another attention implementation of transformers, and back, however deep its configurations."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface.calls import refusal


@dataclass(frozen=True, eq=False)
class Implementations:
    """The attention implementation of every configuration object inside a model."""

    named: dict[str, str]
    configs: tuple[tuple[Any, str | None], ...]


def implementation(model: nn.Module) -> dict[str, str]:
    """The attention implementation configured now, by sub-config name ("" is the model's own config)."""
    config: Any = model.config
    found = {"": config._attn_implementation}
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None:
            found[name] = sub._attn_implementation
    return {name: impl if impl is not None else "eager" for name, impl in found.items()}


def implementations(model: nn.Module) -> Implementations:
    """What ``restore`` needs to put every configuration of the model back, however deep it is nested."""
    found: dict[int, tuple[Any, str | None]] = {}
    queue: list[Any] = [part.config for part in model.modules() if hasattr(part, "config")]
    while queue:
        config = queue.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = (config, config._attn_implementation_internal)
        queue += [
            x for x in (getattr(config, key, None) for key in getattr(config, "sub_configs", {})) if x is not None
        ]
    return Implementations(implementation(model), tuple(found.values()))


def switch(model: nn.Module, name: str, function: Any, mask_function: Any) -> None:
    """Register an attention implementation and switch ``model`` to it, refusing a model that does not follow."""
    before = implementations(model)
    kept = name in AttentionInterface._global_mapping
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_function)
    try:
        with _unlogged():
            model.set_attn_implementation(name)  # type: ignore[operator]
    except Exception as error:
        restore(before, name, keep=kept)
        raise HeadscopeError(refusal(model, str(error).splitlines()[0])) from error
    if name not in implementation(model).values():
        restore(before, name, keep=kept)
        raise HeadscopeError(refusal(model, "it keeps its own attention code"))


@contextmanager
def _unlogged() -> Iterator[None]:
    """transformers warns of what ``switch`` finds out and says itself."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def restore(before: Implementations, name: str, *, keep: bool = False) -> None:
    """Set every configuration back and, unless ``keep``, unregister ``name``."""
    for config, impl in before.configs:
        config._attn_implementation_internal = impl
    if not keep:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)
