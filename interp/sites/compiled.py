"""Compiled models: while a handler is attached, what torch.compile compiled runs as plain Python.

A compiled graph holds the attention it was compiled with. Ours would break it at every layer (an error where
``fullgraph=True``), and CUDA graphs would write again to the memory that statistics were read from. So inside a block
torch's stance is "force_eager": a module from ``torch.compile(model)``, ``model.compile()``, a compiled forward or
layer, and what ``generate`` compiles for a static cache all run uncompiled, with the numbers of the uncompiled model.
(Steps over a static cache that are only read become CUDA graphs of ours: ``headscope.interp.tracing.step_graphs``.)
Nothing is thrown away: after the block the same graphs run again, without compiling anew. headscope's own compiled
kernel (FlexAttention) sets the stance that it needs.

What leaves no Python to return to (a module from ``torch.export``, ahead-of-time compilation, captured CUDA graphs)
calls no attention function; the site refuses a forward pass in which none was called.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any

import torch
from torch._dynamo import OptimizedModule

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.interrupts import block, uninterrupted


class _Held:
    """The stance is one for the whole process: the first block to begin changes it, the last to end brings it back."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.blocks: list[object] = []
        self.stance: Any = None

    def enter(self, entry: object) -> None:
        with self.lock:
            if not self.blocks:
                self.stance = torch.compiler.set_stance("force_eager")
            self.blocks.append(entry)

    def leave(self, entry: object) -> None:
        if entry not in self.blocks:
            return
        with self.lock:
            self.blocks.remove(entry)
            if not self.blocks:
                self.stance.__exit__(None, None, None)


_HELD = _Held()


@block
def uncompiled() -> Iterator[None]:
    """Run every compiled function inside the block as plain Python; blocks nest and may end in any order.

    Raises:
        HeadscopeError: the block begins inside a function that is being compiled.
    """
    entry = object()
    try:
        with uninterrupted():
            _enter(entry)
        yield
    finally:
        try:
            with uninterrupted():
                _HELD.leave(entry)
        finally:
            _HELD.leave(entry)  # an interrupt may have come just before; a second time does nothing


def _enter(entry: object) -> None:
    try:
        _HELD.enter(entry)
    except RuntimeError as error:
        raise HeadscopeError(
            "tracing and editing cannot begin inside a function that torch.compile runs; put the `with` block around "
            "the call of the compiled function"
        ) from error


def plain(model: Any) -> Any:
    """The module that torch.compile wrapped, or ``model`` itself."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return model
