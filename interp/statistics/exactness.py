"""What is exact under what: the table that the tracer enforces. What is not in it as exact is refused, never guessed.

Every row statistic (one value a query) is exact under chunked prefill, windows, caches and padding: each query's row is
computed whole, in the pass that holds the query, against every key it sees. The exceptions stand on the classes
(``refused``, ``refused_with``).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

from headscope.interp import statistics as catalogue
from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.base import Statistic

CONDITIONS = {
    "padding": "padding around the tokens of an example",
    "gaps": "padding between the tokens of an example",
    "cache": "a pass that continues a cache",
    "chunked prefill": "a prompt in several passes",
    "sliding window": "layers that see a limited window",
    "packed sequences": "several sequences in one example",
    "cross-attention": "queries and keys of different sequences",
}


def name_of(statistic: Statistic) -> str:
    """The row of the table for a declared statistic."""
    return type(statistic).__name__ + "".join(f"({field}=...)" for field in _given(statistic))


def is_exact(statistic: Statistic, condition: str) -> bool:
    """Whether a declared statistic is exact under a condition of ``CONDITIONS``."""
    return condition not in refused_by(statistic)


def refused_by(statistic: Statistic) -> dict[str, str]:
    """Where a declared statistic is not exact, and why: what its class says, and what its settings add."""
    more = (statistic.refused_with[field] for field in _given(statistic))
    return dict(ChainMap(*map(dict, more), dict(statistic.refused)))


def _given(statistic: Statistic) -> list[str]:
    return [field for field in statistic.refused_with if getattr(statistic, field) is not None]


def conditions_of(call: AttentionCall, *, continues: bool) -> set[str]:
    """The conditions that one attention call is under; ``continues``: an earlier pass holds the tokens before it."""
    mask = call.mask
    found = {
        "padding": mask.start is not None or mask.end is not None,
        "gaps": call.gaps,
        "cache": continues,
        "chunked prefill": continues and call.query.shape[2] > 1,
        "sliding window": mask.left is not None or mask.chunk is not None,
        "packed sequences": mask.segments is not None,
        "cross-attention": call.cross,
    }
    return {name for name, holds in found.items() if holds}


class Exactness:
    """Refuses calls in which one of some statistics is not exact; what each refuses is found once."""

    def __init__(self, statistics: tuple[Statistic, ...]) -> None:
        self._refused = [(statistic, refused_by(statistic)) for statistic in statistics]
        self._conditions = {condition for _, refused in self._refused for condition in refused}

    def require(self, call: AttentionCall, *, continues: bool) -> None:
        """Refuse the first statistic that is not exact in this call.

        Raises:
            HeadscopeError: names the statistic, the condition and why.
        """
        held = conditions_of(call, continues=continues) & self._conditions
        for statistic, refused in self._refused if held else ():
            for condition, why in refused.items():
                if condition in held:
                    raise HeadscopeError(
                        f"{name_of(statistic)} is not exact with {CONDITIONS[condition]} ({why}); leave it out, or "
                        "trace inputs without that"
                    )


def exceptions() -> dict[str, Mapping[str, str]]:
    """Every statistic, and every setting of one that makes a difference: condition -> why it is refused there."""
    classes = [x for x in vars(catalogue).values() if isinstance(x, type) and issubclass(x, Statistic) and x.name]
    found: dict[str, Mapping[str, str]] = {}
    for one in classes:
        found[one.__name__] = one.refused
        found |= {f"{one.__name__}({field}=...)": {**one.refused, **x} for field, x in one.refused_with.items()}
    return found


def table() -> str:
    """The table as Markdown."""
    lines = ["| statistic | " + " | ".join(CONDITIONS) + " |", "|---" * (len(CONDITIONS) + 1) + "|"]
    for name, refused in exceptions().items():
        cells = ["refused" if condition in refused else "exact" for condition in CONDITIONS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
