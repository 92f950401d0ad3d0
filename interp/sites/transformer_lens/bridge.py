"""What a TransformerBridge is made of: its attention components, whether they attend natively, its caches."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.transformer_lens.attention import Layer

COMPONENT = "transformer_lens.model_bridge.generalized_components.attention"


def require_bridge(bridge: Any) -> None:
    """Raise HeadscopeError unless ``bridge`` is a TransformerBridge around a model in this process."""
    package = require()
    if not isinstance(bridge, import_module(f"{package.__name__}.model_bridge").TransformerBridge):
        raise HeadscopeError(f"expected a TransformerBridge, got {type(bridge).__name__}")
    if getattr(bridge.original_model.config, "is_encoder_decoder", False):
        name = type(bridge.original_model).__name__
        raise HeadscopeError(f"{name} is an encoder-decoder; trace it as a Hugging Face model, not through a bridge")


def require() -> Any:
    """The transformer_lens package, or a HeadscopeError that says how to install it."""
    try:
        return import_module("transformer_lens")
    except ImportError as error:
        raise HeadscopeError("TransformerLens is not installed; pip install 'headscope[sites]'") from error


def boot(name: str, model: Any, tokenizer: Any, **kwargs: Any) -> Any:
    """A live TransformerBridge around a Hugging Face model, which it changes in place: give it a copy of its own.

    Raises:
        HeadscopeError: TransformerLens is not installed.
    """
    bridge = import_module(f"{require().__name__}.model_bridge").TransformerBridge
    kwargs.setdefault("device", str(next(model.parameters()).device))
    return bridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer, dtype=model.dtype, **kwargs)


def components(bridge: Any) -> list[tuple[str, Any]]:
    """The bridge's attention components with their paths in the wrapped model, language layers only."""
    kind = import_module(COMPONENT).AttentionBridge
    found = [
        (name.replace("._original_component", ""), module)
        for name, module in bridge.original_model.named_modules()
        if isinstance(module, kind) and str(module.hook_pattern.name).startswith("blocks.")
    ]
    if not found:
        raise HeadscopeError(f"{type(bridge.original_model).__name__}'s bridge has no attention layers to trace")
    return found


def attends_natively(bridge: Any) -> bool:
    """Whether its attention is the wrapped modules' own, where an edit at ``hook_pattern`` comes too late to count.

    Raises HeadscopeError where only some layers attend natively.
    """
    kind = import_module(COMPONENT).AttentionBridge
    native = [type(module).forward is kind.forward for _, module in components(bridge)]
    if any(native) and not all(native):
        raise HeadscopeError(
            f"{type(bridge.original_model).__name__}'s bridge attends natively in some layers only, so no site sees "
            "all of it; load the model with load_model or transformers and trace that"
        )
    return all(native)


class WatchedCache:
    """A cache seen through: ``update`` tells a layer which keys and values it attends to."""

    def __init__(self, cache: Any, layer: Layer) -> None:
        self._cache, self._layer = cache, layer

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        _, offset = self._cache.get_mask_sizes(key.shape[2], layer_idx)
        keys, values = self._cache.update(key, value, layer_idx, *args, **kwargs)
        self._layer.cached(keys, values, int(offset))
        return keys, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def watch_cache(layer: Layer, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A forward pre-hook that hands the layer's attention a watched cache instead of the bare one."""
    return args, {
        name: WatchedCache(value, layer) if name in ("past_key_values", "layer_past") and value is not None else value
        for name, value in kwargs.items()
    }
