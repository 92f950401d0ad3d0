"""The Hugging Face site: AttentionCalls through transformers' attention and mask interfaces.

Attaching switches the model to an attention implementation named "headscope", whose function hands every call to the
handlers in force; leaving restores what was configured, on every sub-config, also after an exception. Nothing is
registered or patched at import.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from headscope.interp.attention import Handler, bare_model, run_call
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.hf_calls import leave, make_call, original_function, refusal
from headscope.interp.sites.hf_masks import lazy_mask
from headscope.interp.sites.towers import tower

NAME = "headscope"
Check = Callable[..., None]
__all__ = ["attached", "is_attached", "make_call", "original_function", "refusal"]


@dataclass(frozen=True, eq=False)
class Implementations:
    """The attention implementation of every configuration object inside a model."""

    named: dict[str, str]
    configs: tuple[tuple[Any, str | None], ...]


@dataclass(eq=False)
class Route:
    """One routed model: its handlers in order of entry and how to put it back.

    ``check`` is called with every attention call before it is answered (see ``headscope.interp.verify``).
    """

    model: nn.Module
    restore: Implementations
    handlers: list[Handler] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    check: Check | None = None
    inside: nn.Module | None = None
    busy: dict[tuple[str, int], bool] = field(default_factory=dict)

    def is_busy(self, site: str, layer: int) -> bool:
        """Whether any handler in force reads or changes a layer; ``busy`` remembers while they are the same."""
        found = self.busy.get((site, layer))
        if found is None:
            found = self.busy[site, layer] = any(handler.concerns(site, layer) for handler in self.handlers)
        return found


@dataclass(frozen=True, eq=False)
class _Place:
    route: Route
    name: str
    site: str
    layer: int
    tower: str
    implementation: str


_CHECKS: WeakKeyDictionary[nn.Module, Check] = WeakKeyDictionary()
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
    route.busy.clear()
    try:
        yield route
    finally:
        route.handlers.remove(handler)
        route.busy.clear()
        if not route.handlers:
            _close(route)


def implementation(model: nn.Module) -> dict[str, str]:
    """The attention implementation configured now, by sub-config name ("" is the model's own config)."""
    config: Any = model.config
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
    route = Route(model, implementations(model), check=_CHECKS.get(model))
    made = places(route)
    switch(model, NAME, attention_function, lazy_mask)
    _PLACES.update(made)
    _ROUTES[model] = route
    for part in {id(m): m for m in (model, getattr(model, "base_model", model))}.values():
        route.hooks.append(part.register_forward_pre_hook(_Begin(route), with_kwargs=True))
        route.hooks.append(part.register_forward_hook(_End(route), always_call=True))
    return route


def places(route: Route) -> dict[nn.Module, _Place]:
    """Every module of a model with its site, layer, tower and the attention implementation configured for it."""
    configured = {id(config): impl for config, impl in route.restore.configs}
    default = route.restore.named[""]
    found: dict[nn.Module, _Place] = {}
    ranks: dict[str, int] = {}
    for name, module in route.model.named_modules():
        site, layer = parse_name(name, module)
        if site.count("*") > 1:  # a tower in stages: layers count through them
            layer = ranks[site] = ranks.get(site, -1) + 1
        impl = configured.get(id(getattr(module, "config", None))) or default
        found[module] = _Place(route, name, site, layer, tower(site, route.model), impl)
    return found


def set_check(model: nn.Module, check: Check) -> None:
    """Have ``check`` called with every attention call of ``model`` from now on, while anything is attached."""
    _CHECKS[model] = check
    if model in _ROUTES:
        _ROUTES[model].check = check


def sites_of(model: Any) -> set[str]:
    """The patterns of the model's modules that stand in layers, attention or not."""
    names = (parse_name(name, module)[0] for name, module in bare_model(model).named_modules())
    return {name for name in names if "*" in name}


def _close(route: Route) -> None:
    model = route.model
    for hook in route.hooks:
        hook.remove()
    for module in model.modules():
        _PLACES.pop(module, None)
    _ROUTES.pop(model, None)
    restore(route.restore, NAME, keep=bool(_ROUTES))


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


def parse_name(name: str, module: nn.Module | None) -> tuple[str, int]:
    """A module's site pattern and layer: "model.layers.3.self_attn" is ("model.layers.*.self_attn", 3).

    A name with several numbers has the first one's layer here; ``places`` counts such layers through.
    """
    name = name.replace("._original_component", "")  # what a TransformerBridge puts between a layer and its parts
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    site = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
    layer = int(numbers[0]) if numbers else getattr(module, "layer_idx", None)
    return site, 0 if layer is None else int(layer)


class _Begin:
    """Tells the handlers that a forward pass begins: of the model, or of its base model called directly."""

    def __init__(self, route: Route) -> None:
        self.route = route

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.route.inside is not None and model is not self.route.model:
            return
        inputs = dict(kwargs)
        if args and "input_ids" not in inputs:
            inputs["input_ids"] = args[0]
        for handler in self.route.handlers:
            if self.route.inside is not None:  # the last pass was interrupted where no hook could tell
                handler.abort_forward()
            handler.begin_forward(inputs)
        self.route.inside = model


class _End:
    def __init__(self, route: Route) -> None:
        self.route = route

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.route.inside is not model:
            return
        self.route.inside = None
        for handler in self.route.handlers:
            if output is None:  # torch calls the hook also after an exception
                handler.abort_forward()
            else:
                handler.end_forward()


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
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
    if not place.route.is_busy(place.site, place.layer):
        options = {**kwargs, "scaling": scaling, "dropout": dropout}
        own = leave(module, place.implementation, query, key, value, attention_mask, **options)
        if own is not None:
            return own, None
    call = make_call(module, place, query, key, value, attention_mask, scaling, dropout, kwargs)
    if place.route.check is not None:
        place.route.check(module, place, call, attention_mask, {**kwargs, "scaling": scaling, "dropout": dropout})
    z = run_call(call, place.route.handlers)
    return z.transpose(1, 2).contiguous(), None


def release_all() -> None:
    """Detach every handler from every model (after an interrupt in the middle of attaching)."""
    for route in list(_ROUTES.values()):
        route.handlers.clear()
        _close(route)


def is_attached(model: Any) -> bool:
    """Whether anything of ours is on the model now."""
    return bare_model(model) in _ROUTES
