"""Sinks that are not at the start: tokens deep in a text on which a head rests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored, by_head
from headscope.interp.heads.texts import TextMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import KeyMass, Statistic


@dataclass(frozen=True, kw_only=True)
class HiddenSinks(TextMethod):
    """Score heads by the mean mass that queries put on later sinks: what attention calibration would move away.

    The detection of ACT, Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks" (arXiv 2406.15765;
    models/llama_modelling_aug.py): with m_j = sum_i A[i, j] / (T - j), S = {j : m_j > threshold}, and the hidden sinks
    are S without its first element, wherever that is. As in the code the threshold is absolute (the paper's alpha / N,
    relative to the length, names no alpha) and the divisor is T - j in windowed layers too. [OURS]: as a score, the sum
    over hidden sinks of sum_i A[i, j] / T, the mean over all rows of the mass on them. How many they are on average, a
    text and head, is in ``provenance["hidden_sinks"]``.

    What it does not show: that moving the mass would help (ACT tries each head on a task). The last keys are seen by
    few queries, so they pass the threshold easily; they weigh little in the score, and fully in the number.

    Args:
        threshold: the mean attention above which a key is a sink (the code's 0.1; it takes 0.15 for MT-Bench).
    """

    name: ClassVar[str] = "hidden_sinks"
    unit: ClassVar[str] = "mass"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    source: ClassVar[str] = "arXiv 2406.15765"
    tests: ClassVar[str] = "heads/test_sinking.py"
    reproduced: ClassVar[str] = (
        "m_j, S and the mass on it against eager weights and in closed form for uniform attention"
    )
    not_reproduced: ClassVar[str] = "the authors' accuracies after calibration: Llama-2-7B"

    threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.threshold < 1.0:
            raise HeadscopeError(
                f"threshold={self.threshold} is no threshold for a share of attention: choose 0 < threshold < 1"
            )

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [KeyMass()]

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        sums = records[0]["key_mass"].transpose("example", "layer", "head", "key").to_numpy().astype(np.float64)
        sinks = sums / np.arange(sums.shape[-1], 0, -1) > self.threshold
        hidden = sinks & (np.cumsum(sinks, axis=-1) > 1)
        mass = np.where(hidden | ~np.isfinite(sums), sums, 0.0).sum(axis=-1) / sums.shape[-1]
        counts = hidden.sum(axis=-1).mean(axis=(1, 2))
        return [(by_head(lm, records[0], one), {"hidden_sinks": float(n)}) for one, n in zip(mass, counts, strict=True)]

    def summary(self, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"hidden_sinks": float(np.mean([one["hidden_sinks"] for one in details]))}
