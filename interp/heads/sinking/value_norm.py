"""How short the sink's value is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from headscope.interp.heads.sinking.norms import NormRatio
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import Statistic, ValueNorm


@dataclass(frozen=True, kw_only=True)
class SinkValueNorm(NormRatio):
    """Score heads by the L2 norm of one value, the sink's, over the mean norm of the text's other values.

    Gu et al. 2024 (arXiv 2410.10781; eval_activations_open_source.py): values as they stand in the cache. The paper
    plots the norms and finds the sink's small: a head that rests there writes little. The ratio is ours. Query heads
    that share a value head share a score.

    What it does not show: what the output projection makes of the value, or that a head which rests there is idle.
    """

    name: ClassVar[str] = "sink_value_norm"
    tests: ClassVar[str] = "heads/test_sinking.py"
    reproduced: ClassVar[str] = (
        "norms against the cache of the model, padded on either side; SmolLM2's sink heads have a short sink "
        "value (median below 0.8), as the paper finds"
    )
    variable: ClassVar[str] = "value_norm"

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [ValueNorm()]
