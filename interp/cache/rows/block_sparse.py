"""MInference's block-sparse pattern: blocks of queries choose blocks of keys by their means."""

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
class BlockSparse(RowPolicy):
    """Every block of queries sees the ``budget // block`` blocks of keys whose mean has the largest inner product
    with its own mean query, of those that begin no later than it.

    MInference's estimate (Jiang et al. 2024, arXiv 2407.02490; ``block_sparse_flash_attention.py:151-186`` @ fb56c917:
    64 tokens, unscaled, 100 blocks). The own block is not forced, as there: a row that is left without any key it may
    see keeps nothing. A block's mean query is over all of its rows, later ones too: it is a pattern for reading
    (``at="prefill"``). Blocks count from the first token, without their padding by a full block.

    Args:
        block: tokens of a block.
    """

    name: ClassVar[str] = "block_sparse"
    unit: ClassVar[str] = "q.k"
    source: ClassVar[str] = "Jiang et al. 2024, arXiv 2407.02490; microsoft/MInference @ fb56c917"
    refused = {**ONE_SEQUENCE, "edits": "a block's keys depend on its later queries"}

    block: int = 64

    def rule(self, reading: Reading, budget: Budget) -> Keep:
        index = blocks_of(reading, self.block)
        count = (budget.count(reading.count) // self.block).clamp(min=1)
        query, key = (block_means(x, reading, self.block) for x in (reading.call.query, reading.call.key))
        score = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(2, 3)
        rows, columns = (torch.arange(n, device=index.device) for n in score.shape[2:])
        chosen = heaviest(score.masked_fill(columns > rows[:, None], -torch.inf), count)  # (batch, head, block, block)

        def shown(tile: Tile) -> Tensor:
            own = index[:, tile.rows][:, None, :, None].expand(-1, chosen.shape[1], -1, chosen.shape[3])
            return keys_in(chosen.gather(2, own), index, tile.keys)

        return shown
