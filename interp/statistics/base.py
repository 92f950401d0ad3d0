"""What a declaration of a statistic is.

A statistic says which variables of the record it writes, over which dimensions, and what it needs of an attention call.
``ask`` asks a ``Plan`` for reductions and returns a function from the computed ``Reduced`` to the variables; the plan
merges what all declared statistics ask for into one request, so sharing is automatic. A statistic that needs more than
reductions (a ``CallStatistic``) is given the call itself.

Positions are counted from each example's first real token: padding never shifts a statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.plan import Plan as Plan
from headscope.kernels.request import Reduced

Reader = Callable[[Reduced], dict[str, Tensor]]
Kind = Literal["row", "key", "block", "output"]
ROW: Kind = "row"
KEY: Kind = "key"
BLOCK: Kind = "block"
OUTPUT: Kind = "output"


@dataclass(frozen=True)
class Statistic:
    """Base of the declarations. ``kind``: values belong to queries, keys, blocks of both, or outputs at positions."""

    name: ClassVar[str] = ""
    kind: ClassVar[Kind] = ROW

    def ask(self, plan: Plan) -> Reader:
        """Ask ``plan`` for reductions; return how to read them."""
        raise NotImplementedError

    @property
    def coordinates(self) -> dict[str, list[Any]]:
        """Extra trailing dimensions and their labels."""
        return {}

    @property
    def shared(self) -> dict[str, Any]:
        """What every statistic of one record must agree on, by name: the labels of dimensions, and a size of blocks."""
        return dict(self.coordinates)

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the record variables this statistic writes."""
        return (self.name,)


@dataclass(frozen=True)
class CallStatistic(Statistic):
    """A statistic that is computed from the call itself, beside the shared pass."""

    def ask(self, plan: Plan) -> Reader:
        """Ask for nothing of the shared pass; a subclass may ask, and find it in ``measure``."""
        return lambda reduced: {}

    def measure(self, call: AttentionCall, reduced: Reduced, rows: Tensor | None) -> dict[str, Tensor]:
        """This statistic's variables for ``call``, of its rows ``rows`` (None: all); ``reduced``: what was asked."""
        raise NotImplementedError


def check_together(statistics: Sequence[Statistic]) -> None:
    """Refuse declarations that one record cannot hold.

    Raises:
        HeadscopeError: none at all, a variable twice, or a dimension whose labels or blocks differ.
    """
    if not statistics:
        raise HeadscopeError("name at least one statistic to trace, e.g. trace(model, [Entropy()])")
    names = [name for statistic in statistics for name in statistic.variables]
    if len(set(names)) != len(names):
        raise HeadscopeError(f"two statistics write the same variable: {sorted(names)}; declare each once")
    agreed: dict[str, Any] = {}
    for statistic in statistics:
        for dim, labels in statistic.shared.items():
            if agreed.setdefault(dim, labels) != labels:
                raise HeadscopeError(
                    f"statistics in one trace share the dimension {dim}, but ask for {agreed[dim]} and {labels}; make "
                    "them alike, or trace twice"
                )


def need(x: Tensor | None) -> Tensor:
    """A result that was asked for."""
    assert x is not None
    return x
