"""MoBA: every query chooses blocks of keys by their mean key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.blocks import block_means, blocks_of, heaviest, keys_in
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import ONE_SEQUENCE, RowPolicy
from headscope.interp.cache.reading import Reading
from headscope.kernels.kept import Keep
from headscope.kernels.streaming.weights import Tile


@dataclass(frozen=True, kw_only=True)
class MoBA(RowPolicy):
    """Every query sees its own block and the earlier blocks whose mean key has the largest inner product with it.

    Gate g[t, n] = q_t . mean_{s in block n} k_s, keys after RoPE, without scale; the own block always, later ones
    never, and the best ``budget // block`` in all, at least the own (Lu et al. 2025, arXiv 2502.13189;
    MoonshotAI/MoBA @ 61e456bc, ``moba/moba_naive.py:7-96``; their example has 12 blocks of 4,096). Models that were
    trained with it are another matter: this says what the gates would lose of a model that was not.

    Args:
        block: tokens of a block.
    """

    name: ClassVar[str] = "moba"
    unit: ClassVar[str] = "q.k"
    source: ClassVar[str] = "Lu et al. 2025, arXiv 2502.13189; MoonshotAI/MoBA @ 61e456bc"
    refused = {**ONE_SEQUENCE, "edits": "each row's blocks depend on its query"}

    block: int = 64

    def rule(self, reading: Reading, budget: Budget) -> Keep:
        index, query = blocks_of(reading, self.block), reading.call.query
        count = (budget.count(reading.count) // self.block).clamp(min=1)
        means = block_means(reading.call.key, reading, self.block)
        means = means.repeat_interleave(query.shape[1] // means.shape[1], dim=1)
        number = torch.arange(means.shape[2], device=index.device)

        def shown(tile: Tile) -> Tensor:
            own = index[:, tile.rows][:, None, :, None]
            gate = query[:, :, tile.rows].to(means.dtype) @ means.transpose(2, 3)
            gate = gate.masked_fill(number > own, -torch.inf).masked_fill(number == own, torch.inf)
            return keys_in(heaviest(gate, count), index, tile.keys)

        return shown
