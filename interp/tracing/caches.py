"""What forward passes may not do while they are recorded, because the record would be wrong without anyone noticing."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.towers import tower_of


class Caches:
    """Refuses what moves examples or takes tokens back inside a key-value cache while a tracer records."""

    MOVES = {"reorder_cache": "beam search", "batch_select_indices": "beam search", "crop": "assisted generation"}

    def __init__(self) -> None:
        self._watched: list[weakref.ref[Any]] = []  # weak: a trace of many prompts must not keep all their caches

    def watch(self, cache: Any) -> None:
        """Put the refusals on a cache object (not on its class)."""
        self._watched = [seen for seen in self._watched if seen() is not None]
        if cache is None or any(cache is seen() for seen in self._watched) or not hasattr(cache, "__dict__"):
            return
        self._watched.append(weakref.ref(cache))
        for name, who in self.MOVES.items():
            if hasattr(cache, name) and name not in vars(cache):
                setattr(cache, name, _refuse(who))

    def release(self) -> None:
        """Take the refusals off."""
        for cache in (seen() for seen in self._watched):
            for name in self.MOVES if cache is not None else ():
                vars(cache).pop(name, None)
        self._watched.clear()


def _refuse(who: str) -> Any:
    def refuse(*_: Any, **__: Any) -> None:
        raise HeadscopeError(
            f"{who} rearranges the cache between steps, so a record would mix examples; generate without it, or trace "
            "a forward pass over the finished text"
        )

    return refuse


def check_repeats(model: nn.Module, call: AttentionCall) -> None:
    """Refuse a module that attends again in one pass, unless it goes through images or windows one by one.

    Raises:
        HeadscopeError: layers share the module, so its calls are different layers.
    """
    if tower_of(call.module, model) not in ("vision", "audio") or call.query.shape[0] != 1:
        raise HeadscopeError(
            f"{call.module} attends more than once in a forward pass: layers that share their weights cannot be told "
            "apart, so this model is not recorded"
        )
