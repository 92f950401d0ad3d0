"""How short the sink's key is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from headscope.interp.heads.sinking.norms import NormRatio
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import KeyNorm, Statistic


@dataclass(frozen=True, kw_only=True)
class SinkKeyNorm(NormRatio):
    """Score heads by the L2 norm of one key, the sink's, over the mean norm of the text's other keys.

    Gu et al. 2024 (arXiv 2410.10781; eval_activations_open_source.py): keys as they stand in the cache, after position
    embedding (which changes no norm where it rotates). The paper plots the norms and finds the sink's small: the logit
    of a sink comes of its angle (``sink_angle``). The ratio is ours. Query heads that share a key head share a score.

    What it does not show: whether anything looks there (``sinks``), or why. A ratio near 0 marks a short key.
    """

    name: ClassVar[str] = "sink_key_norm"
    tests: ClassVar[str] = "heads/test_sinking.py"
    reproduced: ClassVar[str] = "norms against the cache of the model, padded on either side; ratios by hand"
    not_reproduced: ClassVar[str] = "the paper's plots: its models need a hub"
    variable: ClassVar[str] = "key_norm"

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [KeyNorm()]
