"""Declarations of what a tracer records, one frozen dataclass each: see ``base`` for how to add one."""

from headscope.interp.registry import Registry
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
from headscope.interp.statistics.keys_for_mass import KeysForMass
from headscope.interp.statistics.logit_parts import LogitParts
from headscope.interp.statistics.norms import KeyNorm, ValueNorm
from headscope.interp.statistics.outputs import HeadOutput, SpanOutput
from headscope.interp.statistics.rollout import Rollout
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
from headscope.interp.statistics.stream import Resid

# A statistic's name on the command line -> its class. To add one: its file and this line.
STATISTICS: Registry[Statistic] = Registry(
    "statistic",
    "statistics",
    "headscope.interp.statistics",
    {
        "logsumexp": "rows:LogSumExp",
        "max_logit": "rows:MaxLogit",
        "entropy": "rows:Entropy",
        "sink_mass": "rows:SinkMass",
        "span_mass": "rows:SpanMass",
        "distance": "rows:Distance",
        "windowed_distance": "rows:WindowedDistance",
        "window_mass": "rows:WindowMass",
        "top_keys": "rows:TopKeys",
        "target_mass": "rows:TargetMass",
        "key_mass": "keys:KeyMass",
        "keys_for_mass": "keys_for_mass:KeysForMass",
        "key_norm": "norms:KeyNorm",
        "value_norm": "norms:ValueNorm",
        "logit_parts": "logit_parts:LogitParts",
        "block_map": "blocks:BlockMap",
        "top_blocks": "blocks:TopBlocks",
        "z": "outputs:HeadOutput",
        "z_span": "outputs:SpanOutput",
        "js_divergence": "divergence:Divergence",
        "rollout": "rollout:Rollout",
        "resid": "stream:Resid",
    },
)

__all__ = [
    "STATISTICS",
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
    "KeyNorm",
    "KeyStatistic",
    "KeysForMass",
    "LogSumExp",
    "LogitParts",
    "MaxLogit",
    "Plan",
    "Reader",
    "Resid",
    "Rollout",
    "SinkMass",
    "SpanMass",
    "SpanOutput",
    "Statistic",
    "TargetMass",
    "TopBlocks",
    "TopKeys",
    "ValueNorm",
    "WindowMass",
    "WindowedDistance",
]
