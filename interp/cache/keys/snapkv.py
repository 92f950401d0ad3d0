"""SnapKV: what the last queries of the prompt look at, smoothed along the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.policy import KeyPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError


@dataclass(frozen=True, kw_only=True)
class SnapKV(KeyPolicy):
    """Attention of the prompt's last ``window`` queries, averaged over them and smoothed over ``kernel`` neighbours.

    After NVIDIA's kvpress (``snapkv_press.py:41-105`` @ 8bb29b9c): s_h[k] = mean over the window's queries of A[q, k],
    for the keys before the window; an average over ``kernel`` neighbours in which keys beyond the ends count as zero;
    the mean over the query heads of a key head. The window itself is always kept, and counts in the budget. The
    authors' own code sums and has a maximum in place of the average; both leave order alone or nearly so.

    Its window is the layer's own: in a sliding layer A has that layer's pattern, as with eager attention in kvpress.

    Args:
        window: last queries of the prompt; the prompt must be longer.
        kernel: keys in an average, an odd number.
    """

    name: ClassVar[str] = "snapkv"
    unit: ClassVar[str] = "mean mass"
    source: ClassVar[str] = "Li et al. 2024, arXiv 2404.14469; NVIDIA/kvpress @ 8bb29b9c"

    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise HeadscopeError(f"{self.name}: window must be 1 or more, and kernel odd")

    def check(self, tokens: Tensor, kept: Tensor) -> None:
        if bool((tokens <= self.window).any()):
            raise HeadscopeError(
                f"{self.name} needs a prompt longer than its window of {self.window} tokens; this one has "
                f"{int(tokens.min())}: give a smaller window (window=...)"
            )
        super().check(tokens, kept)

    def scores(self, reading: Reading) -> Tensor:
        mass = reading.received_in_prompt(self.window) / self.window
        before = (reading.at >= 0) & (reading.at < (reading.count - self.window)[:, None])
        return reading.by_group(smoothed(mass * before[:, None], self.kernel))

    def always(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        sink, recent = super().always(kept)
        return sink, recent.clamp(min=self.window)


def smoothed(x: Tensor, kernel: int) -> Tensor:
    """Averages over ``kernel`` neighbours along the last axis, zeros beyond the ends."""
    return torch.nn.functional.avg_pool1d(x, kernel, stride=1, padding=kernel // 2)
