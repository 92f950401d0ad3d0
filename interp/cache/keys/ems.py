"""EMS: the attention of all queries and that of the last ones, on one scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headscope.interp.cache.policy import KeyPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError


@dataclass(frozen=True, kw_only=True)
class EMS(KeyPolicy):
    """Global-local score: attention of all of the prompt's queries, and of the last ``window``, with the same mean.

    s_glo[k] = sum_q A[q, k], s_loc[k] = sum over the last queries, both the mean over the query heads of a key head,
    s_glo <- s_glo mean(s_loc) / mean(s_glo), and the larger of both (or their sum) is the score: Li et al. 2024 (arXiv
    2412.08521). No code of theirs was found. Which of the two ways they combine by is not settled: ``combine`` [OURS].
    Only the score is here; their merging of what is evicted is not.

    Args:
        window: last queries of the local score.
        combine: ``"max"`` or ``"sum"``.
    """

    name: ClassVar[str] = "ems"
    unit: ClassVar[str] = "mass, summed over queries"
    source: ClassVar[str] = "Li et al. 2024, arXiv 2412.08521 (from summaries)"

    window: int = 64
    combine: Literal["max", "sum"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.combine not in ("max", "sum"):
            raise HeadscopeError(f"{self.name}: window must be 1 or more, and combine 'max' or 'sum'")

    def scores(self, reading: Reading) -> Tensor:
        everywhere = reading.by_group(reading.received_in_prompt())
        local = reading.by_group(reading.received_in_prompt(self.window))
        real = reading.keys[:, None]
        means = [(x * real).sum(-1, keepdim=True) for x in (local, everywhere)]
        everywhere = everywhere * means[0] / means[1]
        return torch.maximum(everywhere, local) if self.combine == "max" else everywhere + local
