"""StreamingLLM: the first tokens and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import RowPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError
from headscope.kernels.kept import Keep
from headscope.kernels.streaming.weights import Tile


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(RowPolicy):
    """Every query sees the first ``sink`` tokens and the last ones before it, its own among them: n in all.

    Key j is seen by query i iff j < sink or i - j < n - sink (Xiao et al. 2023, arXiv 2309.17453; the streaming heads
    of DuoAttention, arXiv 2410.10819, and MInference's A-shape). What differs from StreamingLLM's code: it gives kept
    keys positions within the cache; here they stay where they were, so that recall is that of the model's own pattern.

    Args:
        sink: first tokens (DuoAttention: 128 in training, 64 in use).
    """

    name: ClassVar[str] = "streaming_llm"
    unit: ClassVar[str] = "keys"
    source: ClassVar[str] = "Xiao et al. 2023, arXiv 2309.17453"

    sink: int = 4

    def check(self, tokens: Tensor, kept: Tensor) -> None:
        if bool((kept <= self.sink).any()):
            raise HeadscopeError(f"{self.name} keeps {self.sink} first tokens, which leaves none of {int(kept.min())}")

    def shows(self, query: Tensor, key: Tensor, kept: Tensor) -> Tensor:
        """Whether queries see keys, both at positions from their example's first token, where ``kept`` are seen.

        Raises:
            HeadscopeError: no more than the first tokens are kept.
        """
        self.check(kept, kept)
        return (key < self.sink) | (query - key < kept - self.sink)

    def ends(self, kept: int) -> tuple[int, int]:
        """As ``shows``.

        Raises:
            HeadscopeError: no more than the first tokens are kept.
        """
        self.check(torch.tensor(kept), torch.tensor(kept))
        return self.sink, kept - self.sink

    def rule(self, reading: Reading, budget: Budget) -> Keep:
        kept, start = (x[:, None, None, None] for x in (budget.count(reading.count), reading.start))

        def shown(tile: Tile) -> Tensor:
            query = torch.arange(tile.rows.start, tile.rows.stop, device=kept.device)[:, None]
            key = torch.arange(tile.keys.start, tile.keys.stop, device=kept.device)[None, :]
            return self.shows(query - start, key - start, kept)

        return shown
