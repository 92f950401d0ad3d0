"""The site of models that are written on ``AttentionModule``: handlers are handed to the modules themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from headscope.interp.attention.handler import Handler
from headscope.interp.attention.module import AttentionModule
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.agreement import Verification
from headscope.interp.sites.towers import numbered


class Route:
    """The handlers on one model, in order of entry."""

    def __init__(self, model: nn.Module) -> None:
        self.handlers: list[Handler] = []
        placed = [(m, where, layer) for _, m, where, layer in numbered(model) if isinstance(m, AttentionModule)]
        for module, where, layer in placed:
            if module.layer_idx != layer:
                raise HeadscopeError(f"{where} of layer {layer} was made with layer={module.layer_idx}")
        self._modules = [module for module, _, _ in placed]
        for module, where, _ in placed:
            module.where, module.handlers = where, self.handlers
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def close(self) -> None:
        """Take everything off."""
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            module.where, module.handlers = "", []

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {"input_ids": args[0]} if args else {}
        for handler in self.handlers:
            handler.begin_forward(named | kwargs)

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for handler in self.handlers:
            if output is None:  # torch calls the hook also after an exception
                handler.abort_forward()
            else:
                handler.end_forward()


_ROUTES: WeakKeyDictionary[nn.Module, Route] = WeakKeyDictionary()


@contextmanager
def attached(model: nn.Module, handler: Handler) -> Iterator[Route]:
    """Have ``handler`` see every attention call of ``model``; contexts nest, and the last to leave restores it."""
    route = _ROUTES.get(model) or _ROUTES.setdefault(model, Route(model))
    route.handlers.append(handler)
    try:
        yield route
    finally:
        route.handlers.remove(handler)
        if not route.handlers:
            route.close()
            _ROUTES.pop(model, None)


def is_attached(model: nn.Module) -> bool:
    """Whether anything of ours is on the model now."""
    return model in _ROUTES


def verify_once(model: nn.Module) -> Verification:
    """There is one computation, which every engine is tested against: nothing to compare."""
    return Verification(calls=1)


def verify(model: nn.Module, inputs: Any = None) -> Verification:
    """As ``verify_once``."""
    return verify_once(model)
