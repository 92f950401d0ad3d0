"""Declarations of what a tracer records, one frozen dataclass each: see ``base`` for how to add one."""

from headscope.interp.statistics.base import (
    BLOCK,
    KEY,
    OUTPUT,
    ROW,
    CallStatistic,
    KeyStatistic,
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
    MaxLogit,
    SinkMass,
    SpanMass,
    TargetMass,
    TopKeys,
    WindowedDistance,
    WindowMass,
)

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
    "KeyStatistic",
    "LogSumExp",
    "MaxLogit",
    "Plan",
    "Reader",
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
