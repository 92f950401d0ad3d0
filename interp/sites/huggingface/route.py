"""The Hugging Face site: AttentionCalls through transformers' attention and mask interfaces.

Attaching switches the model to an attention implementation named "headscope", whose function hands every call to the
handlers in force; leaving restores what was configured, on every sub-config, also after an exception. Nothing is
registered or patched at import. ``passes`` tells handlers where forward passes begin and end, ``attention`` answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.huggingface.attention import attention_function
from headscope.interp.sites.huggingface.masks import lazy_mask
from headscope.interp.sites.huggingface.parallel import require_whole_heads, tensor_mesh
from headscope.interp.sites.huggingface.passes import watch_passes
from headscope.interp.sites.huggingface.state import PLACES, Check, Place, Route
from headscope.interp.sites.huggingface.switch import implementations, release, switch, unregister
from headscope.interp.sites.interrupts import block, uninterrupted
from headscope.interp.sites.towers import numbered, tower_of
from headscope.interp.sites.unwrap import bare_model

NAME = "headscope"
LOCK = RLock()  # held while a model is attached, detached or verified: the registries are the process's


_CHECKS: WeakKeyDictionary[nn.Module, Check] = WeakKeyDictionary()
_TRUSTED: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
_ROUTES: WeakKeyDictionary[nn.Module, Route] = WeakKeyDictionary()
_PAUSED: WeakSet[nn.Module] = WeakSet()


@block
def attached(model: ModelLike, handler: Handler) -> Iterator[Route]:
    """Have ``handler`` see every attention call of ``model`` (load_model's result or a Hugging Face module).

    Contexts nest: each adds a handler to the same route, and the last one to leave restores the model.

    Raises:
        HeadscopeError: the architecture does not route through transformers' attention interface.
    """
    inner = bare_model(model)
    entry = object()
    try:
        with uninterrupted(), LOCK:
            route = _ROUTES.get(inner) or _open(inner)
            route.entries[entry] = handler
            route.put_in_force()
        yield route
    finally:
        try:
            with uninterrupted(), LOCK:
                _leave(inner, entry)
        finally:
            _leave(inner, entry)  # an interrupt may have come just before; a second time does nothing


def _leave(model: nn.Module, entry: object) -> None:
    route = _ROUTES.get(model)
    if route is None:
        return
    route.entries.pop(entry, None)
    route.put_in_force()
    if not route.handlers:
        _close(route)


def require_routable(model: nn.Module) -> None:
    """Refuse what no attention implementation can be put on, or whose heads are on processes that we do not know.

    Raises:
        HeadscopeError: names it.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise HeadscopeError(
            f"{type(model).__name__} is not a Hugging Face model; load it with load_model or transformers"
        )
    require_whole_heads(model)


def _open(model: nn.Module) -> Route:
    require_routable(model)
    route = Route(model, implementations(model), check=_CHECKS.get(model), trusted=trusted(model))
    route.heads = tensor_mesh(model)
    made = places(route)
    for module in made:
        held = PLACES.get(module)
        if held is not None and held.route.handlers and "att" in type(module).__name__.lower():
            raise HeadscopeError(
                f"{held.name or type(module).__name__} is traced or edited as part of another "
                f"{type(held.route.model).__name__}; give both blocks the same model"
            )
    _ROUTES[model] = route
    try:
        switch(model, NAME, attention_function, lazy_mask)
        PLACES.update(made)
        route.hooks += watch_passes(route)
    except BaseException:
        _close(route)
        raise
    return route


def places(route: Route) -> dict[nn.Module, Place]:
    """Every module of a model with its pattern of names, layer, tower and configured attention implementation."""
    configured = {id(config): impl for config, impl in route.restore.configs}
    default = route.restore.named[""]
    found: dict[nn.Module, Place] = {}
    for name, module, where, layer in numbered(route.model):
        impl = configured.get(id(getattr(module, "config", None))) or default
        found[module] = Place(route, name, where, layer, tower_of(where, route.model), impl)
    return found


def trusted(model: nn.Module) -> frozenset[str]:
    """The names of attention implementations that the user vouches for in ``model``."""
    return _TRUSTED.get(model, frozenset())


def trust(model: nn.Module, names: frozenset[str]) -> None:
    """From now on functions of these implementations are taken for softmax attention, as far as a check finds."""
    _TRUSTED[model] = trusted(model) | names
    if model in _ROUTES:
        _ROUTES[model].trusted = _TRUSTED[model]


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Run passes of our own inside the block: no handler that is attached sees or changes them."""
    route = _ROUTES.get(model)
    _PAUSED.add(model)
    try:
        if route is not None:
            route.handlers.clear()
            route.busy.clear()
        yield
    finally:
        _PAUSED.discard(model)
        if route is not None:
            route.put_in_force()


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Run passes of our own inside the block: of handlers, those see and change them that are attached inside it."""
    route = _ROUTES.get(model)
    held = {} if route is None else dict(route.entries)
    _PAUSED.add(model)
    try:
        if route is not None:
            with LOCK:
                route.entries = {object(): _Idle()}  # without any the model would be restored
                route.put_in_force()
        yield
    finally:
        _PAUSED.discard(model)
        if route is not None:
            with LOCK:
                route.entries = held
                route.put_in_force()


class _Idle(Handler):
    """Reads and changes nothing."""

    def concerns(self, module: str, layer: int) -> bool:
        """No layer."""
        return False


def is_paused(model: nn.Module) -> bool:
    """Whether a pass of our own runs, which is not shown to handlers."""
    return model in _PAUSED


def set_check(model: nn.Module, check: Check) -> None:
    """Have ``check`` called with every attention call of ``model`` from now on, while anything is attached."""
    _CHECKS[model] = check
    if model in _ROUTES:
        _ROUTES[model].check = check


def _close(route: Route) -> None:
    for hook in route.hooks:
        hook.remove()
    for module in route.model.modules():
        held = PLACES.get(module)
        if held is not None and held.route is route:
            PLACES.pop(module, None)
    _ROUTES.pop(route.model, None)
    held_configs = {id(config) for other in list(_ROUTES.values()) for config, _ in other.restore.configs}
    release(route.restore, NAME, held_configs, keep=bool(_ROUTES))


def release_all() -> None:
    """Detach every handler from every model (after an interrupt in the middle of attaching)."""
    with LOCK:
        for route in list(_ROUTES.values()):
            route.entries.clear()
            route.handlers.clear()
            _close(route)
        unregister(NAME)


def is_attached(model: ModelLike) -> bool:
    """Whether anything of ours is on the model now."""
    return bare_model(model) in _ROUTES
