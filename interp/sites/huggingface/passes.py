"""Where forward passes of a routed model begin and end, and in which thread."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface.parallel import require_same_inputs
from headscope.interp.sites.huggingface.state import Route
from headscope.interp.sites.unwrap import stopped

_THREADS = threading.Lock()


def watch_passes(route: Route) -> list[Any]:
    """Hooks on the model and on every model inside it, whose outermost call is a pass: the base model, a language model
    within a vision-language model, or an encoder may be called by itself."""
    parts = [part for part in route.model.modules() if part is route.model or isinstance(part, PreTrainedModel)]
    hooks: list[Any] = []
    for part in parts:
        hooks.append(part.register_forward_pre_hook(_Begin(route), with_kwargs=True))
        hooks.append(part.register_forward_hook(_End(route), always_call=True))
    return hooks


def check_thread(route: Route) -> None:
    """Refuse an attention call of a thread while a pass runs in another.

    Raises:
        HeadscopeError: their rows would be mixed.
    """
    if route.thread is not None and route.thread.ident != threading.get_ident() and route.thread.is_alive():
        raise _two_threads(route.model)


def _two_threads(model: nn.Module) -> HeadscopeError:
    return HeadscopeError(
        f"{type(model).__name__} is traced or edited and was called from two threads at once, whose passes would be "
        "mixed: call it from one thread at a time (hold a lock around the call)"
    )


class _Bound:
    """A hook where forward passes begin or end. In a copy of the model, or one saved to disk, it does nothing."""

    def __init__(self, route: Route) -> None:
        self.route = route

    def __reduce__(self) -> Any:  # of the standard library alone, so that a saved model loads without headscope
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __deepcopy__(self, memo: Any) -> Any:
        return contextlib.nullcontext().__exit__


def is_ours(hook: Any) -> bool:
    """Whether a hook is one that ``watch_passes`` put on a model."""
    return isinstance(hook, _Bound)


class _Begin(_Bound):
    """Tells the handlers that a forward pass begins."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        route = self.route
        with _THREADS:
            check_thread(route)
            own = route.thread is not None and route.thread.ident == threading.get_ident()
            if route.inside is not None and own and model is not route.model and model is not route.inside:
                return  # a model inside the one that runs
            broken = route.inside is not None  # the last pass was interrupted where no hook could tell
            route.inside, route.thread, route.called = model, threading.current_thread(), False
        inputs = dict(kwargs)
        if args and "input_ids" not in inputs:
            inputs["input_ids"] = args[0]
        if route.heads is not None:
            require_same_inputs(route.heads, inputs)
        asked = inputs.get("output_attentions")
        route.maps = bool(getattr(model.config, "output_attentions", False) if asked is None else asked)
        route.forget_pass()
        for handler in route.handlers:
            if broken:
                handler.abort_forward()
            handler.begin_forward(inputs)


class _End(_Bound):
    """Tells the handlers that a pass broke off, and refuses one that ran without calling attention."""

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        route = self.route
        if route.inside is not model or route.thread is not threading.current_thread():
            return
        route.inside = route.thread = None
        route.maps = False
        route.forget_pass()
        cache = getattr(output, "past_key_values", None)
        done = output is not None or stopped()  # torch calls the hook also after an exception, without an output
        for handler in route.handlers:
            if done and route.called:
                if cache is not None:
                    handler.fill_cache(cache)
                handler.end_forward()
            else:
                handler.abort_forward()
        whole = model is route.model or model is getattr(route.model, "base_model", None)
        if done and whole and not route.called:
            raise HeadscopeError(
                f"{type(model).__name__} ran without calling its attention, as an exported, ahead-of-time compiled or "
                "captured model does: nothing can be traced or edited in it; use the model it was made from"
            )
