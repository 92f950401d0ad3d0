"""What forward passes may not do while they are recorded, because the record would be wrong without anyone noticing."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.interrupts import uninterrupted
from headscope.interp.sites.towers import tower_of
from headscope.interp.tracing.guards import Around, Guard, guard, release


class Caches:
    """Refuses what moves examples or takes tokens back inside a key-value cache while a tracer records."""

    MOVES = {"reorder_cache": "beam search", "batch_select_indices": "beam search", "crop": "assisted generation"}

    def __init__(self) -> None:
        self._watched: list[tuple[weakref.ref[Any], list[Guard | None]]] = []  # weak: traces of many prompts keep none

    def watch(self, cache: Any) -> None:
        """Guard a cache object (no copy of it, and not its class)."""
        if cache is None or any(cache is seen() for seen, _ in self._watched) or not hasattr(cache, "__dict__"):
            return
        with uninterrupted():  # a guard that is not listed could not be taken off
            for seen, guards in self._watched:
                if seen() is None:
                    _release(guards)
            self._watched = [(seen, guards) for seen, guards in self._watched if seen() is not None]
            guards = [guard(cache, name, _refuse(who)) for name, who in self.MOVES.items()]
            self._watched.append((weakref.ref(cache), guards))

    def release(self) -> None:
        """Take the guards off."""
        with uninterrupted():
            for _, guards in self._watched:
                _release(guards)
            self._watched.clear()


def _release(guards: list[Guard | None]) -> None:
    for made in guards:
        release(made)


def _refuse(who: str) -> Around:
    def refuse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
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
