"""Nodes of a pass: heads and MLPs by name, which of them come before which, and what receivers mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.probes.patching.places import COMPONENTS, INPUTS

LOGITS = "logits"
_NAMED = re.compile(r"L(\d+)(?:H(\d+)|MLP)(?:\.([qkvz]))?", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Node:
    """A head (``L3H2``), or an MLP (``L3MLP``: ``head`` is None), and for a receiver which of its values are meant:
    ``component`` q, k, v or z of a head (``L3H2.q``), ``mlp_out`` of an MLP. ``LOGITS`` as a receiver is the residual
    stream behind the last layer."""

    layer: int
    head: int | None = None
    component: str = ""

    def __post_init__(self) -> None:
        if self.layer < 0 or (self.head or 0) < 0:
            raise HeadscopeError(f"no node ({self.layer}, {self.head}): layers and heads count from 0")

    @classmethod
    def of(cls, name: Node | str | tuple[int, int], component: str = "") -> Node:
        """A node by name, or from (layer, head); ``component`` where the name says none.

        Raises:
            HeadscopeError: no such name.
        """
        if isinstance(name, Node):
            return name
        if not isinstance(name, str):
            return cls(int(name[0]), int(name[1]), component)
        found = _NAMED.fullmatch(name.strip())
        if found is None or (found[3] and found[2] is None):
            raise HeadscopeError(f"{name!r} names no node: write L3H2, L3H2.q (k, v, z) or L3MLP")
        if found[2] is None:
            return cls(int(found[1]), None, "mlp_out" if component else "")
        return cls(int(found[1]), int(found[2]), (found[3] or component).lower())

    def __str__(self) -> str:
        base = f"L{self.layer}MLP" if self.head is None else f"L{self.layer}H{self.head}"
        return f"{base}.{self.component}" if self.component in COMPONENTS else base

    @property
    def order(self) -> tuple[int, bool]:
        """Nodes before another in the pass have a smaller one: heads of a layer, then its MLP."""
        return self.layer, self.head is None

    @property
    def site(self) -> str:
        """Where its output is."""
        return "mlp_out" if self.head is None else "z"


def check_senders(given: Sequence[Node], receivers: Sequence[Node]) -> None:
    """Refuse what cannot send to any of the receivers (none: the logits).

    Raises:
        HeadscopeError: no sender, one named by what it reads, or one that comes before no receiver in the pass.
    """
    if not given:
        raise HeadscopeError("path_effect needs at least one sender, such as L3H2 or L3MLP")
    for node in given:
        if node.component in INPUTS:
            raise HeadscopeError(f"{node} is no sender: what a head sends is its z, so write L{node.layer}H{node.head}")
        if receivers and all(node.order >= one.order for one in receivers):
            raise HeadscopeError(f"{node} can send nothing to {', '.join(map(str, receivers))}: it is not before them")


def senders_of(given: Any) -> list[Node]:
    """Senders as nodes: several, or one by itself.

    Raises:
        HeadscopeError: no such node.
    """
    if isinstance(given, str):
        given = given.split(",")
    return [Node.of(one) for one in ([given] if isinstance(given, Node) else given)]


def receivers_of(given: Any, component: str) -> tuple[Node, ...]:
    """Receivers as nodes; () is the logits.

    Raises:
        HeadscopeError: no such component or node.
    """
    if component not in COMPONENTS:
        raise HeadscopeError(f"no component {component!r}: name one of {', '.join(COMPONENTS)}")
    if isinstance(given, str):
        if given == LOGITS:
            return ()
        given = given.split(",")
    if isinstance(given, Node):
        given = [given]
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, int) for x in given):
        given = [given]
    given = list(given)
    if given == [LOGITS]:
        return ()
    if LOGITS in given:
        raise HeadscopeError(f"the logits are no head that others stand beside: give receivers={LOGITS!r} alone")
    if not given:
        raise HeadscopeError(f"no heads were given as receivers: name some, such as 'L3H2.q', or {LOGITS!r}")
    return tuple(Node.of(one, component) for one in given)
