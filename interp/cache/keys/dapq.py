"""DapQ: what queries at the positions of the answer look at, before there is an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from headscope.interp.cache.keys.snapkv import smoothed
from headscope.interp.cache.policy import ONE_SEQUENCE, KeyPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError
from headscope.kernels.request import Columns, Request


@dataclass(frozen=True, kw_only=True)
class DapQ(KeyPolicy):
    """Attention of ``tokens`` pseudo-queries, which stand where the answer will, on the prompt's keys.

    Tian et al. 2026 (arXiv 2603.11564; from a summary, no code found): tokens are appended to the prompt, read in a
    pass of their own, and dropped with their keys; I_k = mean over them of softmax_k(q.k scale) over the prompt's keys
    alone. Which tokens matters little, they say: here copies of the prompt's first and last, half each [OURS].
    Smoothing and the mean over the query heads of a key head are SnapKV's [OURS].

    Args:
        tokens: pseudo-queries; the paper's optimum is 32 to 64.
        kernel: keys in an average, an odd number; 1: none.
    """

    name: ClassVar[str] = "dapq"
    unit: ClassVar[str] = "mean mass"
    source: ClassVar[str] = "Tian et al. 2026, arXiv 2603.11564 (from a summary)"
    needs: ClassVar[tuple[str, ...]] = ("ahead",)
    refused = {**ONE_SEQUENCE, "edits": "pseudo-queries need a pass of their own, before the prompt is read"}

    tokens: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise HeadscopeError(f"{self.name}: tokens must be 1 or more, and kernel odd")

    def appended(self, ids: Sequence[int]) -> list[int]:
        head = self.tokens - self.tokens // 2
        return [*ids[:head], *ids[len(ids) - self.tokens // 2 :]][: self.tokens]

    def scores(self, reading: Reading) -> Tensor:
        call, ahead = reading.call, reading.ahead
        stop = int(reading.stop[0])
        if ahead is None or bool((reading.stop != stop).any()):
            raise HeadscopeError(f"{self.name} reads pseudo-queries of one prompt, or of prompts that end together")
        prompt = call.with_(
            query=ahead[:, :, : self.tokens],
            key=call.key[:, :, :stop],
            value=call.value[:, :, :stop],
            mask=replace(call.mask, query_offset=stop, end=None),
            key_bias=None if call.key_bias is None else call.key_bias[..., :stop],
        )
        asked = Request(output=False, columns=(Columns(sum=True),))
        mass = prompt.attend(asked).columns[0].sum
        assert mass is not None
        found = reading.by_group(smoothed(mass / ahead.shape[2], self.kernel))
        scores = found.new_zeros(*found.shape[:2], call.key.shape[2])
        scores[..., :stop] = found
        return scores
