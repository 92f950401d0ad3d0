"""The Hugging Face site: AttentionCalls through transformers' attention and mask interfaces.

Attaching switches the model to an attention implementation named "headscope", whose function hands every call to the
handlers in force; leaving restores what was configured, on every sub-config, also after an exception. Nothing is
registered or patched at import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn

from headscope.interp.attention.handler import Handler, run_call
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface.calls import leave, make_call, original_function, refusal
from headscope.interp.sites.huggingface.masks import lazy_mask
from headscope.interp.sites.huggingface.switch import Implementations, implementations, restore, switch
from headscope.interp.sites.towers import numbered, tower_of
from headscope.interp.sites.unwrap import bare_model, stopped

NAME = "headscope"
Check = Callable[..., None]
__all__ = ["attached", "is_attached", "make_call", "original_function", "refusal"]


@dataclass(eq=False)
class Route:
    """One routed model: its handlers in order of entry and how to put it back.

    ``check`` is called with every attention call before it is answered (see ``verify``). ``inside`` is the module whose
    forward pass runs now, ``called`` whether attention was called in it.
    """

    model: nn.Module
    restore: Implementations
    handlers: list[Handler] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    check: Check | None = None
    inside: nn.Module | None = None
    called: bool = False
    busy: dict[tuple[str, int], bool] = field(default_factory=dict)

    def is_busy(self, module: str, layer: int) -> bool:
        """Whether any handler in force reads or changes a layer; ``busy`` remembers while they are the same."""
        found = self.busy.get((module, layer))
        if found is None:
            found = self.busy[module, layer] = any(handler.concerns(module, layer) for handler in self.handlers)
        return found


@dataclass(frozen=True, eq=False)
class _Place:
    route: Route
    name: str
    module: str
    layer: int
    tower: str
    implementation: str


_CHECKS: WeakKeyDictionary[nn.Module, Check] = WeakKeyDictionary()
_ROUTES: WeakKeyDictionary[nn.Module, Route] = WeakKeyDictionary()
_PLACES: WeakKeyDictionary[nn.Module, _Place] = WeakKeyDictionary()
_PAUSED: WeakSet[nn.Module] = WeakSet()


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
    """Every module of a model with its pattern of names, layer, tower and configured attention implementation."""
    configured = {id(config): impl for config, impl in route.restore.configs}
    default = route.restore.named[""]
    found: dict[nn.Module, _Place] = {}
    for name, module, where, layer in numbered(route.model):
        impl = configured.get(id(getattr(module, "config", None))) or default
        found[module] = _Place(route, name, where, layer, tower_of(where, route.model), impl)
    return found


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Run passes of our own inside the block: no handler that is attached sees or changes them."""
    route = _ROUTES.get(model)
    held = [] if route is None else list(route.handlers)
    _PAUSED.add(model)
    try:
        if route is not None:
            route.handlers.clear()
            route.busy.clear()
        yield
    finally:
        _PAUSED.discard(model)
        if route is not None:
            route.handlers[:] = held
            route.busy.clear()


def is_paused(model: nn.Module) -> bool:
    """Whether a pass of our own runs, which is not shown to handlers."""
    return model in _PAUSED


def set_check(model: nn.Module, check: Check) -> None:
    """Have ``check`` called with every attention call of ``model`` from now on, while anything is attached."""
    _CHECKS[model] = check
    if model in _ROUTES:
        _ROUTES[model].check = check


def _close(route: Route) -> None:
    model = route.model
    for hook in route.hooks:
        hook.remove()
    for module in model.modules():
        _PLACES.pop(module, None)
    _ROUTES.pop(model, None)
    restore(route.restore, NAME, keep=bool(_ROUTES))


class _Bound:
    """A hook where forward passes begin or end. A copy of the model, which is not traced, shares it to no effect."""

    def __init__(self, route: Route) -> None:
        self.route = route

    def __deepcopy__(self, memo: Any) -> _Bound:
        return self


class _Begin(_Bound):
    """Tells the handlers that a forward pass begins: of the model, or of its base model called directly."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        whole = self.route.model
        if model is not whole and (self.route.inside is not None or model is not getattr(whole, "base_model", None)):
            return
        inputs = dict(kwargs)
        if args and "input_ids" not in inputs:
            inputs["input_ids"] = args[0]
        for handler in self.route.handlers:
            if self.route.inside is not None:  # the last pass was interrupted where no hook could tell
                handler.abort_forward()
            handler.begin_forward(inputs)
        self.route.inside, self.route.called = model, False


class _End(_Bound):
    """Tells the handlers that a pass broke off, and refuses one that ran without calling attention."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.route.inside is not model:
            return
        self.route.inside = None
        done = output is not None or stopped()  # torch calls the hook also after an exception, without an output
        for handler in self.route.handlers:
            if done and self.route.called:
                handler.end_forward()
            else:
                handler.abort_forward()
        if done and not self.route.called:
            raise HeadscopeError(
                f"{type(model).__name__} ran without calling its attention, as an exported, ahead-of-time compiled or "
                "captured model does: nothing can be traced or edited in it; use the model it was made from"
            )


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
    place.route.called = True
    if not place.route.is_busy(place.module, place.layer):
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
