"""Head span: how far back a head looks on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr

from headscope.interp.heads.anchors.responses import ResponseMethod
from headscope.interp.heads.base import Scored, by_head
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import Distance, Statistic


@dataclass(frozen=True, kw_only=True)
class HeadSpan(ResponseMethod):
    """Score heads by the mean distance that the response's rows look back, sum_s A[t, s] (t - s), in tokens.

    d of Li et al. 2025 (arXiv 2510.13554), which parts the paper's local heads (the 30 % with the smallest) from its
    global ones (the 30 % with the largest): ``headscope.interp.heads.anchors.responses.groups(scores.mean)``
    gives both. The keys include the prompt.

    What it does not show: a head with half its mass on a sink and half on itself has a large span and looks at neither
    middle nor past: compare ``sinks``. Spans grow with the length of the text.
    """

    name: ClassVar[str] = "head_span"
    unit: ClassVar[str] = "tokens"
    tests: ClassVar[str] = "heads/test_anchors.py"
    reproduced: ClassVar[str] = (
        "spans against eager weights, padded on either side; uniform attention in closed form; the 30 % "
        "groups in model order"
    )
    not_reproduced: ClassVar[str] = "Qwen3-4B's curves: the paper's model and its rollouts"

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [Distance()]

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        rows = records[0]["distance"].transpose("example", "layer", "head", "query").to_numpy()[..., self.prompt :]
        return [(by_head(lm, records[0], one), {}) for one in rows.mean(axis=-1, dtype=np.float64)]
