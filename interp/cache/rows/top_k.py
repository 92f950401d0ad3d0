"""Top-k attention: every query takes the keys that fit it best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import ONE_SEQUENCE, RowPolicy
from headscope.interp.cache.reading import Reading
from headscope.kernels.kept import Keep
from headscope.kernels.streaming.weights import Tile


@dataclass(frozen=True, kw_only=True)
class TopK(RowPolicy):
    """Every query of every head sees the n keys of the prompt with the largest inner product, and every later key.

    Synk et al. 2025 (arXiv 2502.06766; ryansynk/topk-decoding @ d8944125, ``topk_attn.py:174-326``): exact search by
    inner product over the prompt's keys, softmax over those found and all keys since. As weights grow with the inner
    product, no n keys of the prompt hold more of a row's mass: it is the ceiling of every policy at that budget. Scores
    are the model's own, with softcap and bias, which the authors' models have not.

    Of rows of the prompt itself it takes the n best of the keys that they see.
    """

    name: ClassVar[str] = "top_k"
    unit: ClassVar[str] = "score"
    source: ClassVar[str] = "Synk et al. 2025, arXiv 2502.06766; ryansynk/topk-decoding @ d8944125"
    refused = {**ONE_SEQUENCE, "edits": "each row's keys depend on all of its scores"}

    def rule(self, reading: Reading, budget: Budget) -> Keep:
        count = budget.count(reading.count)

        def shown(tile: Tile) -> Tensor:
            prompt = reading.keys[:, None, None, tile.keys]
            score = tile.log_p.masked_fill(~prompt, -torch.inf)
            most = min(int(count.max()), score.shape[-1])
            found = score.topk(most, dim=-1).indices
            taken = torch.arange(most, device=score.device) < count[:, None, None, None]
            kept = torch.zeros_like(score, dtype=torch.bool).scatter(-1, found, taken.expand_as(found))
            return kept | ~prompt

        return shown
