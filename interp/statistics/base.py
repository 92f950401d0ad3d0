"""What a declaration of a statistic is.

A statistic says which variables of the record it writes, over which dimensions, and what it needs of an attention call.
``ask`` asks a ``Plan`` for reductions and returns a function from the computed ``Reduced`` to the variables; the plan
merges what all declared statistics ask for into one request, so sharing is automatic. A statistic that needs more than
reductions (a ``CallStatistic``) is given the call itself.

Positions are counted from each example's first real token: padding never shifts a statistic.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.plan import Plan as Plan
from headscope.interp.statistics.queries import check_count
from headscope.interp.statistics.spans import by_example
from headscope.kernels.request import Reduced

Reader = Callable[[Reduced], dict[str, Tensor]]
Kind = Literal["row", "key", "block", "output"]
ROW: Kind = "row"
KEY: Kind = "key"
BLOCK: Kind = "block"
OUTPUT: Kind = "output"


GAPS: Mapping[str, str] = {"gaps": "positions would count the gaps as tokens"}
PACKED: Mapping[str, str] = {
    "packed sequences": "positions count from the example's start, not from each packed sequence's"
}


@dataclass(frozen=True)
class Statistic:
    """Base of the declarations. ``kind``: values belong to queries, keys, blocks of both, or outputs at positions.

    Args:
        label: lets two statistics of one class stand in one trace: their variables, and the dimensions that they add of
            their own, are then named ``"{label}.{name}"`` (``records.labels.own`` gives them back under their plain
            names).
    """

    label: str | None = field(default=None, kw_only=True)
    name: ClassVar[str] = ""
    kind: ClassVar[Kind] = ROW
    unit: ClassVar[str] = ""  # of the variable ``name``; "mass" is a share of a query's attention
    units: ClassVar[Mapping[str, str]] = {}  # of its other variables
    source: ClassVar[str] = ""  # who defined it (arXiv number or DOI), where somebody did
    refused: ClassVar[Mapping[str, str]] = GAPS  # condition (``exactness.CONDITIONS``) -> why it is not exact there
    refused_with: ClassVar[Mapping[str, Mapping[str, str]]] = {}  # the same for a field, where it is not None
    counts: ClassVar[tuple[str, ...]] = ()  # fields that count something: whole numbers from 1 on
    held: ClassVar[tuple[str, ...]] = ()  # fields that name spans: at least one
    at_any_position: ClassVar[bool] = False  # a value follows from the visible keys, wherever its query stands

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__repr__" not in cls.__dict__:  # a dataclass would write its own: nobody wants to read label=None
            cls.__repr__ = Statistic.__repr__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for name in self.counts:
            check_count(f"{kind}({name}={getattr(self, name)!r})", getattr(self, name))
        for name in self.held:
            spans = getattr(self, name)
            if not isinstance(spans, Mapping) or not spans:
                raise HeadscopeError(f"{kind} needs at least one named span, e.g. {kind}({{'needle': (10, 20)}})")
            for span in spans.values():
                if not isinstance(span, str):  # the name of one that is published later
                    by_example(span)

    def __repr__(self) -> str:
        shown = [f"{x.name}={getattr(self, x.name)!r}" for x in fields(self) if x.repr and x.name != "label"]
        shown += [] if self.label is None else [f"label={self.label!r}"]
        return f"{type(self).__qualname__}({', '.join(shown)})"

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
        """Names of the record variables this statistic writes, before its label."""
        return (self.name,)

    def named(self, name: str) -> str:
        """A variable or a dimension of its own as it stands in the record."""
        return name if self.label is None else f"{self.label}.{name}"

    @property
    def recorded(self) -> tuple[str, ...]:
        """Its variables as they stand in the record."""
        return tuple(self.named(name) for name in self.variables)

    @property
    def axes(self) -> dict[str, list[Any]]:
        """Its extra dimensions as they stand in the record, and their labels."""
        return {self.named(dim): labels for dim, labels in self.coordinates.items()}


@dataclass(frozen=True)
class KeyStatistic(Statistic):
    """Base of the statistics with one value a key. What ``ask`` reads are parts, (batch, head, key, ...) each, of one
    pass; ``finish`` makes the variables of them when they are merged over the passes."""

    kind: ClassVar[Kind] = KEY
    empty: ClassVar[float] = 0.0  # of a key that no pass had

    def merge(self, part: str, held: Tensor, value: Tensor) -> Tensor:
        """What is held of all keys of the passes until now, after another gave ``value``."""
        return held + value

    def finish(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The variables (batch, head, key, ...) of the merged parts."""
        return parts


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
    for statistic in statistics:
        if statistic.label is not None and not re.fullmatch(r"[\w-]+", statistic.label):
            raise HeadscopeError(f"{statistic.label!r} labels no statistic; use letters, digits, '_' and '-'")
        if statistic.kind == KEY and not isinstance(statistic, KeyStatistic):
            raise HeadscopeError(f"{type(statistic).__name__} has values of keys; make it a KeyStatistic")
    count = Counter(name for statistic in statistics for name in statistic.recorded)
    twice = sorted(name for name, times in count.items() if times > 1)
    if twice:
        raise HeadscopeError(
            f"two statistics write the same variable: {', '.join(twice)}; give one of them a label, such as label='b'"
        )
    agreed: dict[str, Any] = {}
    for statistic in statistics:
        for own, labels in statistic.shared.items():
            dim = statistic.named(own)
            if agreed.setdefault(dim, labels) != labels:
                raise HeadscopeError(
                    f"statistics in one trace share the dimension {dim}, but ask for {agreed[dim]} and {labels}; make "
                    "them alike, or give one of them a label"
                )


def need(x: Tensor | None) -> Tensor:
    """A result that was asked for."""
    assert x is not None
    return x
