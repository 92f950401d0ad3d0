"""What is exact under what: the table that the tracer enforces. What is not in it as exact is refused, never guessed.

Every row statistic (one value a query) is exact under chunked prefill, windows, caches and padding: each query's row is
computed whole, in the pass that holds the query, against every key it sees. The exceptions are listed here.
"""

from __future__ import annotations

from typing import Any

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError

CONDITIONS = {
    "padding": "padding around the tokens of an example",
    "gaps": "padding between the tokens of an example",
    "cache": "a pass that continues a cache",
    "chunked prefill": "a prompt in several passes",
    "sliding window": "layers that see a limited window",
    "packed sequences": "several sequences in one example",
    "cross-attention": "queries and keys of different sequences",
}
_ONE_SEQUENCE = "it is a distance between positions of one sequence"
_PACKED = "positions count from the example's start, not from each packed sequence's"
_BLOCKS = "blocks of queries and keys count in one sequence"
_GAPS = "positions would count the gaps as tokens"
# Statistic -> condition -> why it is not exact there.
REFUSED: dict[str, dict[str, str]] = {
    "LogSumExp": {},
    "Entropy": {},
    "SinkMass": {"packed sequences": _PACKED},
    "SpanMass": {},
    "Distance": {"cross-attention": _ONE_SEQUENCE},
    "WindowedDistance": {"cross-attention": _ONE_SEQUENCE},
    "WindowMass": {"cross-attention": _ONE_SEQUENCE},
    "TopKeys": {},
    "TargetMass": {"packed sequences": _PACKED},
    "Divergence": {},
    "KeyMass": {},
    "KeyMass(queries=...)": {
        "padding": "query rows would count the padding",
        "cache": "query rows count from each pass",
        "chunked prefill": "query rows count from each pass",
    },
    "BlockMap": {"cross-attention": _BLOCKS},
    "TopBlocks": {"cross-attention": _BLOCKS},
    "HeadOutput": {
        "chunked prefill": "the end of the prompt is not known in its first pass",
        "cross-attention": "positions would count in the other sequence",
    },
}
REFUSED["SpanOutput"] = dict(REFUSED["HeadOutput"])
for _refused in REFUSED.values():
    _refused["gaps"] = _GAPS


def name_of(statistic: Any) -> str:
    """The row of the table for a declared statistic."""
    name = type(statistic).__name__
    return "KeyMass(queries=...)" if name == "KeyMass" and statistic.queries is not None else name


def is_exact(statistic: Any, condition: str) -> bool:
    """Whether a declared statistic is exact under a condition of ``CONDITIONS``."""
    return condition not in _refused_by(statistic)


def _refused_by(statistic: Any) -> dict[str, str]:
    """A statistic of the user's own may list its exceptions as ``refused``; otherwise only gaps are refused."""
    own: dict[str, str] = getattr(statistic, "refused", {"gaps": _GAPS})
    return REFUSED.get(name_of(statistic), own)


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


def require_exact(statistics: tuple[Any, ...], call: AttentionCall, *, continues: bool) -> None:
    """Refuse the first statistic that is not exact in this call.

    Raises:
        HeadscopeError: names the statistic, the condition and why.
    """
    held = conditions_of(call, continues=continues)
    for statistic in statistics:
        for condition, why in _refused_by(statistic).items():
            if condition in held:
                raise HeadscopeError(
                    f"{name_of(statistic)} is not exact with {CONDITIONS[condition]} ({why}); leave it out, or trace "
                    "inputs without that"
                )


def table() -> str:
    """The table as Markdown."""
    lines = ["| statistic | " + " | ".join(CONDITIONS) + " |", "|---" * (len(CONDITIONS) + 1) + "|"]
    for name, refused in REFUSED.items():
        cells = ["refused" if condition in refused else "exact" for condition in CONDITIONS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
