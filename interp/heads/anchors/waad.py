"""WAAD: how far back, within a phrase, a head looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.anchors.responses import ResponseMethod
from headscope.interp.heads.base import Scored, by_head
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import Statistic, WindowedDistance


@dataclass(frozen=True, kw_only=True)
class WindowedSpan(ResponseMethod):
    """Score heads by their windowed average attention distance, sum_s A[t, s] min(t - s, window), over the response.

    WAAD of Li et al. 2025 (arXiv 2510.13554) is this sum for the mean pattern of the local heads, one number a token;
    as it is linear in the pattern, it is the mean of the heads' own. Here each head keeps its own, averaged over the
    rows of the response; ``headscope.interp.heads.anchors.rhythm`` gives the paper's, token by token.

    What it does not show: distances beyond the window, which all count as the window: a head on a sink scores it whole.

    Args:
        window: the distance W at which all farther keys count (the paper's 10).
    """

    name: ClassVar[str] = "waad"
    unit: ClassVar[str] = "tokens"
    tests: ClassVar[str] = "heads/test_anchors.py"
    reproduced: ClassVar[str] = (
        "windowed spans against eager weights; uniform attention in closed form; local heads of SmolLM2 have "
        "a smaller one than global heads"
    )
    not_reproduced: ClassVar[str] = (
        "the paper's table 2 (coupling of peaks): Qwen3 and its rollouts; `rhythm` computes its quantities"
    )

    window: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise HeadscopeError(f"window={self.window}: distances are counted up to 1 token or more")

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [WindowedDistance(self.window)]

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        rows = records[0]["windowed_distance"].transpose("example", "layer", "head", "query").to_numpy()
        means = rows[..., self.prompt :].mean(axis=-1, dtype=np.float64)
        return [(by_head(lm, records[0], one), {}) for one in means]
