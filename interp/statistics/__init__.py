"""Declarations of what a tracer records, one frozen dataclass each: see ``base`` for how to add one."""

from headscope.interp.statistics.base import (
    BLOCK,
    KEY,
    OUTPUT,
    ROW,
    CallStatistic,
    Plan,
    Reader,
    Statistic,
)
from headscope.interp.statistics.blocks import BlockMap, BlockStatistic, TopBlocks
from headscope.interp.statistics.divergence import Divergence
from headscope.interp.statistics.keys import KeyMass
from headscope.interp.statistics.outputs import HeadOutput, SpanOutput
from headscope.interp.statistics.rows import (
    Distance,
    Entropy,
    LogSumExp,
    SinkMass,
    SpanMass,
    TargetMass,
    TopKeys,
    WindowedDistance,
    WindowMass,
)
from headscope.interp.statistics.stream import Resid

__all__ = [
    "BLOCK",
    "BlockMap",
    "BlockStatistic",
    "KEY",
    "OUTPUT",
    "ROW",
    "CallStatistic",
    "Distance",
    "Divergence",
    "Entropy",
    "HeadOutput",
    "KeyMass",
    "LogSumExp",
    "Plan",
    "Reader",
    "Resid",
    "SinkMass",
    "SpanMass",
    "SpanOutput",
    "Statistic",
    "TargetMass",
    "TopBlocks",
    "TopKeys",
    "WindowMass",
    "WindowedDistance",
]
