"""Observed attention: the mean attention that a key got of the queries that see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from headscope.interp.cache.policy import KeyPolicy
from headscope.interp.cache.reading import Reading


@dataclass(frozen=True, kw_only=True)
class ObservedAttention(KeyPolicy):
    """Attention that a key got while the prompt was read, divided by the number of queries after it and its own.

    s_h[k] = sum_q A[h, q, k] / (T - k) for T tokens, the mean over the query heads of a key head: kvpress's
    ``observed_attention_press.py:34-49`` (@ 8bb29b9c). The divisor is T - k in windowed layers too, as there. The last
    keys are seen by few queries, their own among them, and score high for it.
    """

    name: ClassVar[str] = "observed_attention"
    unit: ClassVar[str] = "mean mass"
    source: ClassVar[str] = "NVIDIA/kvpress @ 8bb29b9c; after arXiv 2306.14048"

    def scores(self, reading: Reading) -> Tensor:
        left = (reading.count[:, None] - reading.at).clamp(min=1)
        return reading.by_group(reading.received_in_prompt() / left[:, None])
