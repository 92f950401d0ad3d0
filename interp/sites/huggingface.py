"""The Hugging Face site: AttentionCalls through transformers' attention and mask interfaces.

Attaching switches the model to an attention implementation named "headscope", whose function hands every call to the
handlers in force; leaving restores what was configured, on every sub-config, also after an exception. Nothing is
registered or patched at import.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headscope.interp.attention import AttentionCall, Handler, bare_model, run_call
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.hf_masks import LazyMask, from_dense, lazy_mask
from headscope.kernels.masks import Mask

NAME = "headscope"


@dataclass(eq=False)
class Route:
    """One routed model: its handlers in order of entry and how to put it back."""

    model: nn.Module
    restore: dict[str, str]
    handlers: list[Handler] = field(default_factory=list)
    hook: Any = None


@dataclass(frozen=True, eq=False)
class _Place:
    route: Route
    name: str
    site: str
    layer: int


_ROUTES: WeakKeyDictionary[nn.Module, Route] = WeakKeyDictionary()
_PLACES: WeakKeyDictionary[nn.Module, _Place] = WeakKeyDictionary()


@contextmanager
def attached(model: Any, handler: Handler) -> Iterator[Route]:
    """Have ``handler`` see every attention call of ``model`` (load_model's result or a Hugging Face module).

    Contexts nest: each adds a handler to the same route, and the last one to leave restores the model.

    Raises:
        HeadscopeError: the architecture does not route through transformers' attention interface.
    """
    inner = bare_model(model)
    route = _ROUTES.get(inner) or _open(inner)
    route.handlers.append(handler)
    try:
        yield route
    finally:
        route.handlers.remove(handler)
        if not route.handlers:
            _close(route)


def implementation(model: nn.Module) -> dict[str, str]:
    """The attention implementation configured now, by sub-config name ("" is the model's own config)."""
    config = model.config
    found = {"": config._attn_implementation}
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None:
            found[name] = sub._attn_implementation
    return {name: impl if impl is not None else "eager" for name, impl in found.items()}


def _open(model: nn.Module) -> Route:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise HeadscopeError(
            f"{type(model).__name__} is not a Hugging Face model; load it with load_model or transformers"
        )
    route = Route(model, implementation(model))
    switch(model, NAME, attention_function, lazy_mask)
    for name, module in model.named_modules():
        site, layer = parse_name(name, module)
        _PLACES[module] = _Place(route, name, site, layer)
    route.hook = model.register_forward_pre_hook(_begin, with_kwargs=True)
    _ROUTES[model] = route
    return route


def _close(route: Route) -> None:
    model = route.model
    if route.hook is not None:
        route.hook.remove()
    for module in model.modules():
        _PLACES.pop(module, None)
    _ROUTES.pop(model, None)
    restore(model, route.restore, NAME, keep=bool(_ROUTES))


def switch(model: nn.Module, name: str, function: Any, mask_function: Any) -> None:
    """Register an attention implementation and switch ``model`` to it, refusing a model that does not follow."""
    before = implementation(model)
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_function)
    try:
        model.set_attn_implementation(name)
    except Exception as error:
        restore(model, before, name)
        raise HeadscopeError(refusal(model, str(error).splitlines()[0])) from error
    if name not in implementation(model).values():
        restore(model, before, name)
        raise HeadscopeError(refusal(model, "it keeps its own attention code"))


def restore(model: nn.Module, before: dict[str, str], name: str, *, keep: bool = False) -> None:
    """Set every sub-config back and, unless ``keep``, unregister ``name``."""
    if implementation(model) != before:
        model.set_attn_implementation(before)
    if not keep:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def refusal(model: nn.Module, why: str) -> str:
    """The one-line refusal of an architecture."""
    kind = getattr(model.config, "model_type", type(model).__name__)
    return (
        f"{type(model).__name__} ({kind}) does not route through transformers' attention interface ({why}); "
        "tracing it would be silently empty, so it is refused. Use a model whose attention is routed"
    )


def parse_name(name: str, module: nn.Module | None) -> tuple[str, int]:
    """A module's site pattern and layer: "model.layers.3.self_attn" is ("model.layers.*.self_attn", 3)."""
    name = name.replace("._original_component", "")  # what a TransformerBridge puts between a layer and its parts
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    site = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name, count=1)
    layer = int(numbers[0]) if numbers else getattr(module, "layer_idx", None)
    return site, 0 if layer is None else int(layer)


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inputs = dict(kwargs)
    if args and "input_ids" not in inputs:
        inputs["input_ids"] = args[0]
    for handler in _ROUTES[model].handlers:
        handler.begin_forward(inputs)


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: (batch, head, query, d) in, (batch, query, head, d_value) out."""
    place = _PLACES.get(module)
    if place is None:
        raise HeadscopeError(
            f"{type(module).__name__} attends outside the model that was traced; trace the whole model"
        )
    call = make_call(module, place, query, key, value, attention_mask, scaling, dropout, kwargs)
    z = run_call(call, place.route.handlers)
    return z.transpose(1, 2).contiguous(), None


def make_call(
    module: nn.Module,
    place: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> AttentionCall:
    """The AttentionCall of one call of transformers' interface, or a refusal where it holds more than one can say."""
    if dropout:
        raise HeadscopeError("attention dropout is active; call model.eval() before tracing or editing")
    for name in ("position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise HeadscopeError(refusal(place.route.model, f"its attention takes {name!r}, which is not supported"))
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=_mask_of(module, query, key, attention_mask, kwargs),
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        layer=place.layer,
        site=place.site,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )


def _mask_of(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Mask:
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(mask, LazyMask):
        return mask.rule
    if mask is not None:
        return from_dense(mask, queries)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    if not causal or queries == 1:
        return Mask.full() if queries > 1 else Mask(query_offset=keys - 1, right=None)
    return Mask.causal(keys - queries)


def original_function(module: nn.Module, name: str) -> Any:
    """The attention function that ``module`` would call under implementation ``name``."""
    if name == "eager":
        namespace = __import__(type(module).__module__, fromlist=["eager_attention_forward"])
        return namespace.eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def release_all() -> None:
    """Detach every handler from every model (after an interrupt in the middle of attaching)."""
    for route in list(_ROUTES.values()):
        route.handlers.clear()
        _close(route)


def is_attached(model: Any) -> bool:
    """Whether anything of ours is on the model now."""
    return bare_model(model) in _ROUTES
