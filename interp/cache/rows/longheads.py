"""LongHeads: every query of every head chooses chunks of the text by a summary of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.blocks import blocks_of, heaviest, keys_in
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import ONE_SEQUENCE, RowPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.rotary import Rotation
from headscope.kernels.kept import Keep
from headscope.kernels.streaming.weights import Tile


@dataclass(frozen=True, kw_only=True)
class LongHeads(RowPolicy):
    """Every query sees the first chunk, its own, the one before it, and the chunks whose summary fits it best.

    Lu et al. 2024 (arXiv 2402.10685; ``modeling_llama.py:293-402, 509-657`` @ 1c9f72e7). Of a chunk g of ``chunk``
    tokens, every head's self-attention among them alone gives outputs whose mean is c_g; the summary is sum_i
    softmax_i(c_g.k_i scale) k_i over its keys, turned to their positions within the chunk. A query before RoPE chooses
    by its inner product with the summaries of earlier chunks, ``budget // chunk`` chunks in all, at least the three.
    Queries before ``begin`` see everything. A row of the prompt does not see its own key, as in the authors' code (its
    keys end before it); later rows do.

    What differs: kept keys stay at their positions, where the authors number them anew, so that recall is that of the
    model's own pattern. Attention within a chunk sees both ways, as ``self.attn`` of their code does (``causal`` is
    False there). A later row that ends a chunk sees the chunk before it too, which they do not force there. Chunks and
    positions count from the first token; a chunk that is not complete has no summary, and nobody needs it.

    Args:
        chunk: tokens of a chunk.
        begin: first query that chooses (4,096 with a budget of 4,096 in their settings).
    """

    name: ClassVar[str] = "longheads"
    unit: ClassVar[str] = "q.k"
    source: ClassVar[str] = "Lu et al. 2024, arXiv 2402.10685; LuLuLuyi/LongHeads @ 1c9f72e7"
    needs: ClassVar[tuple[str, ...]] = ("rotation",)
    refused = {**ONE_SEQUENCE, "edits": "each row's chunks depend on its query"}

    chunk: int = 256
    begin: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1 or self.begin < 1:
            raise HeadscopeError(f"{self.name}: chunk and begin must be 1 or more")

    def rule(self, reading: Reading, budget: Budget) -> Keep:
        rotation, index, query = reading.rotation, blocks_of(reading, self.chunk), reading.call.query
        if rotation is None:
            raise HeadscopeError(f"{self.name} turns queries back and was not told how the layer turns them")
        count = (budget.count(reading.count) // self.chunk).clamp(min=3)
        number = torch.arange(int(index.max()) + 1, device=index.device)
        summary = query.new_zeros(*query.shape[:2], len(number), query.shape[3], dtype=reading.scored.dtype)
        for b in range(query.shape[0]):
            own = self._summaries(reading, rotation, b)
            summary[b, :, : own.shape[1]] = own

        def shown(tile: Tile) -> Tensor:
            at, own = (x[:, tile.rows][:, None, :, None] for x in (reading.at, index))
            plain = rotation.turn(query[:, :, tile.rows], -rotation.angles(at[..., 0].clamp(min=0)))
            score = (plain @ summary.transpose(2, 3)).masked_fill(number > own, -torch.inf)
            forced = (number == 0) | (number == own) | (number == own - 1)
            kept = keys_in(heaviest(score.masked_fill(forced, torch.inf), count), index, tile.keys)
            itself = (reading.at[:, None, None, tile.keys] == at) & (at < reading.count[:, None, None, None])
            return (kept & ~itself) | (at < self.begin)

        return shown

    def _summaries(self, reading: Reading, rotation: Rotation, example: int) -> Tensor:
        """The summary of each whole chunk of one example: (head, chunk, d_head)."""
        call, w = reading.call, self.chunk
        first = int(reading.start[example])
        many = (call.key.shape[2] - first) // w
        part = slice(first, first + many * w)
        q, k, v = (x[example, :, part].to(reading.scored.dtype) for x in (call.query, call.key, call.value))
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        q, k, v = (x.reshape(x.shape[0], many, w, x.shape[2]) for x in (q, k, v))  # (head, chunk, token, d)
        c = ((call.scale * q @ k.transpose(2, 3)).softmax(-1) @ v).mean(2, keepdim=True)  # RoPE: distances alone count
        at = torch.arange(many * w, device=q.device).view(many, w)
        local = rotation.turn(k, rotation.angles(at % w) - rotation.angles(at))
        weight = (call.scale * c @ local.transpose(2, 3)).softmax(-1)
        return (weight @ local).squeeze(2)
