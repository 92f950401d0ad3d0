"""Switching a model to another attention implementation of transformers, and back, however deep its configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface.calls import refusal
from headscope.interp.sites.quiet import errors_only


class Switched(str):
    """The name of our implementation on a configuration; a copy of the configuration, or one saved to disk, holds the
    model's ``own`` instead, for it leaves the block while the name does not."""

    own: str | None

    @staticmethod
    def __new__(cls, name: str, own: str | None) -> Switched:
        made = super().__new__(cls, name)
        made.own = own
        return made

    def __deepcopy__(self, memo: Any) -> str | None:
        return self.own

    def __reduce__(self) -> Any:
        return (type(None), ()) if self.own is None else (str, (self.own,))


@dataclass(frozen=True, eq=False)
class Implementations:
    """The attention implementation of every configuration object inside a model, by name ("" is the model's own) and
    by object: what the user configured, and what stood there."""

    named: dict[str, str]
    configs: tuple[tuple[Any, str | None], ...]
    found: tuple[str | None, ...]


def _own(name: str | None) -> str | None:
    """What the user configured, where another block that shares the configuration has put our name."""
    return name.own if isinstance(name, Switched) else name


def implementation(model: nn.Module) -> dict[str, str]:
    """The attention implementation that the user configured, by sub-config name ("" is the model's own config)."""
    config: Any = model.config
    found = {"": _own(config._attn_implementation)}
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None:
            found[name] = _own(sub._attn_implementation)
    return {name: impl if impl is not None else "eager" for name, impl in found.items()}


def implementations(model: nn.Module) -> Implementations:
    """What ``restore`` needs to put every configuration of the model back, however deep it is nested."""
    configs = _configs(model)
    now = tuple(config._attn_implementation_internal for config in configs)
    pairs = tuple((config, _own(name)) for config, name in zip(configs, now, strict=True))
    return Implementations(implementation(model), pairs, now)


def _configs(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    queue: list[Any] = [part.config for part in model.modules() if hasattr(part, "config")]
    while queue:
        config = queue.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        queue += [
            x for x in (getattr(config, key, None) for key in getattr(config, "sub_configs", {})) if x is not None
        ]
    return list(found.values())


def switch(model: nn.Module, name: str, function: Any, mask_function: Any) -> None:
    """Register an attention implementation and switch ``model`` to it, refusing a model that does not follow."""
    before = implementations(model)
    kept = name in AttentionInterface._global_mapping
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_function)
    try:
        with errors_only("transformers.modeling_utils"):
            model.set_attn_implementation(name)  # type: ignore[operator]
        if name not in (config._attn_implementation for config, _ in before.configs):
            raise HeadscopeError(refusal(model, "it keeps its own attention code"))
        for config, own in before.configs:
            if config._attn_implementation_internal == name:
                config._attn_implementation_internal = Switched(name, own)
    except BaseException as error:
        restore(before, name, keep=kept)
        if isinstance(error, HeadscopeError) or not isinstance(error, Exception):
            raise
        raise HeadscopeError(refusal(model, str(error).splitlines()[0])) from error


def restore(before: Implementations, name: str, *, keep: bool = False) -> None:
    """Set every configuration back to what stood there and, unless ``keep``, unregister ``name``."""
    for (config, _), found in zip(before.configs, before.found, strict=True):
        config._attn_implementation_internal = found
    if not keep:
        unregister(name)


def release(before: Implementations, name: str, held: set[int], *, keep: bool) -> None:
    """The same at the end of a block: to what the user configured, but for configurations (by id) that other blocks
    have switched too."""
    for config, own in before.configs:
        if id(config) not in held:
            config._attn_implementation_internal = own
    if not keep:
        unregister(name)


def unregister(name: str) -> None:
    """Forget an implementation."""
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)
