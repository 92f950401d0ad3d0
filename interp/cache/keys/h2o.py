"""H2O: heavy hitters, the keys that got most attention while the prompt was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.policy import KeyPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError


@dataclass(frozen=True, kw_only=True)
class H2O(KeyPolicy):
    """Attention that a key got of all of the prompt's queries, summed; part of the budget goes to the last tokens.

    s_h[k] = sum_q A[h, q, k] (Zhang et al. 2023, arXiv 2306.14048, Section 4: accumulated scores, half of the budget
    for recent tokens), the mean over the query heads of a key head. Early keys are seen by more queries and score
    higher for that alone; ``observed_attention`` divides by their number.

    What differs: H2O evicts at every step, also while it reads, so that its sums are those of the evicting model. Here
    the sums are exact ones of the whole prompt, and decided once, at its end, as kvpress does.

    Args:
        recent_share: of the budget, for the last tokens (rounded down).
    """

    name: ClassVar[str] = "h2o"
    unit: ClassVar[str] = "mass, summed over queries"
    source: ClassVar[str] = "Zhang et al. 2023, arXiv 2306.14048"

    recent_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent_share < 1:
            raise HeadscopeError(f"{self.name}: recent_share must be at least 0 and below 1, not {self.recent_share}")

    def scores(self, reading: Reading) -> Tensor:
        return reading.by_group(reading.received_in_prompt())

    def always(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        sink, recent = super().always(kept)
        return sink, torch.maximum(recent, (kept * self.recent_share).floor().to(kept.dtype))
