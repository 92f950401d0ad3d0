"""Statistics as a user may write them: one or several, each an object, a class or a registered name; and the units of
what they record."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import make
from headscope.interp.statistics import STATISTICS, Statistic

Named = Statistic | type[Statistic] | str  # a class or a name stands for the statistic with its default settings


def declared(statistics: Named | Iterable[Named]) -> tuple[Statistic, ...]:
    """The declarations that ``statistics`` means: ``Entropy()``, ``[Entropy, KeyMass("mean")]``, ``"entropy"``.

    Raises:
        HeadscopeError: something that is no statistic, an unknown name, or a class whose settings have to be given.
    """
    if isinstance(statistics, Statistic | type | str) or not isinstance(statistics, Iterable):
        return (_one(statistics),)
    return tuple(_one(each) for each in statistics)


def _one(given: Any) -> Statistic:
    if isinstance(given, Statistic):
        return given
    if isinstance(given, str):
        return make(STATISTICS[given], given, {})
    if isinstance(given, type) and issubclass(given, Statistic):
        return make(given, given.__name__, {})
    raise HeadscopeError(
        f"{given!r} is no statistic: give objects of headscope.interp.statistics, such as trace(lm, [Entropy(), "
        "KeyMass()]), or names that `headscope list statistics` prints"
    )


def unit_of(variable: str) -> str:
    """The unit of a record's variable, with or without a label; "" where no registered statistic writes it."""
    return _units().get(variable.rpartition(".")[2], "")


@cache
def _units() -> dict[str, str]:
    found: dict[str, str] = {}
    for cls in STATISTICS.values():
        found |= {cls.name: cls.unit, **cls.units}
    return found
