"""What many scores say together: how far they can be trusted, what differs between runs, what kinds of heads there are.

    agreement      which methods find the same heads, beside what shuffled scores share
    reliability    whether the scores come out the same from half of the trials
    nulls          the same method on random weights, or with shuffled targets
    difference     one method on two models (or checkpoints) of one shape, head by head
    depth          one method on models of any shape, by relative depth
    comparison     which of these a set of runs allows
    features       a vector a head from one record
    taxonomy       kinds of heads: those vectors clustered and named, and how stable that is
    detectors      which kinds a method's high scores fall into
    pattern_embedding  patterns pooled and encoded, beside PCA

Names are imported on first use, so that the command line starts without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headscope.interp.analysis.agreement import Agreement as Agreement
    from headscope.interp.analysis.agreement import agree as agree
    from headscope.interp.analysis.comparison import Comparison as Comparison
    from headscope.interp.analysis.comparison import compare as compare
    from headscope.interp.analysis.depth import by_depth as by_depth
    from headscope.interp.analysis.difference import Difference as Difference
    from headscope.interp.analysis.difference import contrast as contrast
    from headscope.interp.analysis.nulls import Null as Null
    from headscope.interp.analysis.nulls import null as null
    from headscope.interp.analysis.nulls import random_twin as random_twin
    from headscope.interp.analysis.reliability import Reliability as Reliability
    from headscope.interp.analysis.reliability import split_half as split_half

_HOME = {
    "Agreement": "agreement",
    "Comparison": "comparison",
    "Difference": "difference",
    "Null": "nulls",
    "Reliability": "reliability",
    "agree": "agreement",
    "by_depth": "depth",
    "compare": "comparison",
    "contrast": "difference",
    "null": "nulls",
    "random_twin": "nulls",
    "split_half": "reliability",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
