"""What stands on a model while anything is attached to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Thread
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from headscope.interp.attention.handler import Handler
from headscope.interp.attention.split_rows import SplitRows
from headscope.interp.sites.huggingface.dense_masks import DenseMasks
from headscope.interp.sites.huggingface.switch import Implementations

Check = Callable[..., None]


@dataclass(eq=False)
class Route:
    """One routed model: its handlers in order of entry and how to put it back.

    ``check`` is called with every attention call before it is answered (see ``verify``). ``inside`` is the module whose
    forward pass runs now, ``thread`` the thread that runs it, ``called`` whether attention was called in it, ``maps``
    whether it was asked for its attention weights, ``dense`` the dense masks that it has used, ``known`` which classes
    of modules call plain softmax attention in it. ``trusted``: names of implementations that the user vouches for.
    ``heads``: the processes that hold heads of it (a mesh of torch), ``rows`` the positions of a text that each reads.
    """

    model: nn.Module
    restore: Implementations
    handlers: list[Handler] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    check: Check | None = None
    trusted: frozenset[str] = frozenset()
    inside: nn.Module | None = None
    thread: Thread | None = None
    called: bool = False
    maps: bool = False
    dense: DenseMasks = field(default_factory=DenseMasks)
    entries: dict[object, Handler] = field(default_factory=dict)
    busy: dict[tuple[str, int], bool] = field(default_factory=dict)
    known: dict[tuple[type, str], bool] = field(default_factory=dict)
    heads: Any = None
    rows: SplitRows | None = None

    def forget_pass(self) -> None:
        """What was found of a pass's masks and functions holds for that pass alone."""
        self.dense.held.clear()
        self.known.clear()

    def put_in_force(self) -> None:
        """The handlers are those of the blocks that are open."""
        self.handlers[:] = self.entries.values()
        self.busy.clear()

    def is_busy(self, module: str, layer: int) -> bool:
        """Whether any handler in force reads or changes a layer; ``busy`` remembers while they are the same."""
        found = self.busy.get((module, layer))
        if found is None:
            found = self.busy[module, layer] = any(handler.concerns(module, layer) for handler in self.handlers)
        return found


@dataclass(frozen=True, eq=False)
class Place:
    """A module of a routed model: its name, pattern of names, layer, tower and configured attention implementation."""

    route: Route
    name: str
    module: str
    layer: int
    tower: str
    implementation: str


PLACES: WeakKeyDictionary[nn.Module, Place] = WeakKeyDictionary()  # of every module of the routed models
