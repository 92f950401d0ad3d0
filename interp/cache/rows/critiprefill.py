"""CritiPrefill: segments of queries choose blocks of keys by the extremes of both, layers together."""

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
from headscope.kernels.kept import Keep
from headscope.kernels.streaming.weights import Tile


@dataclass(frozen=True, kw_only=True)
class CritiPrefill(RowPolicy):
    """Every segment of the prompt's queries sees itself and the blocks before it that are most critical to it.

    Lv et al. 2024 (arXiv 2409.12490; ``criti_prefill/ops.py:7-130`` @ 3067f1ec). Of a segment s, q_s is half the sum of
    the largest and the smallest value of each dimension; of a block b of keys k+ and k- are those. The score is
    max(q_s.k+, q_s.k-), without scale, the mean over the query heads of a key head, and P_s its softmax over the blocks
    before the segment. From the third layer on P <- ``fusion`` P' + (1 - fusion) P, P' being that of the layer before.
    The ``budget // block`` largest are seen. Queries before ``begin``, those of the last segment, those after the
    prompt and those of the first ``skip`` layers see everything: it is a pattern for reading (``at="prefill"``).

    What differs: a segment with fewer blocks before it than the budget takes those alone, where theirs would fill up
    with later ones. "The layer before" is the last one below that attends.

    Args:
        segment: queries of a segment, a multiple of ``block``.
        block: keys of a block.
        begin: first query that does without some keys (rounded up to a segment).
        fusion: weight of the layer before; 0: each layer for itself.
        skip: first layers that see everything.
    """

    name: ClassVar[str] = "critiprefill"
    unit: ClassVar[str] = "share of softmax over blocks"
    source: ClassVar[str] = "Lv et al. 2024, arXiv 2409.12490; 66RING/CritiPrefill @ 3067f1ec"
    needs: ClassVar[tuple[str, ...]] = ("carried",)
    refused = {**ONE_SEQUENCE, "edits": "a segment's blocks depend on its later queries"}

    segment: int = 512
    block: int = 32
    begin: int = 4096
    fusion: float = 0.25
    skip: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or self.segment < self.block or self.segment % self.block or self.begin < 0:
            raise HeadscopeError(f"{self.name}: segment is a multiple of block, block is 1 or more, begin 0 or more")
        if not 0 <= self.fusion < 1:
            raise HeadscopeError(f"{self.name}: fusion is at least 0 and below 1, not {self.fusion}")

    def rule(self, reading: Reading, budget: Budget) -> Keep:
        index, place = (blocks_of(reading, size) for size in (self.block, self.segment))
        if reading.call.layer < self.skip:
            return lambda tile: torch.ones_like(tile.log_p, dtype=torch.bool)
        critical, count = self.criticality(reading), budget.count(reading.count) // self.block
        chosen = heaviest(critical.masked_fill(~self._before(critical), -torch.inf), count)
        chosen = chosen.repeat_interleave(reading.call.query.shape[1] // chosen.shape[1], dim=1)
        last = (reading.count - 1) // self.segment

        def shown(tile: Tile) -> Tensor:
            own = place[:, tile.rows, None]
            blocks = chosen.gather(2, own[:, None].expand(-1, chosen.shape[1], -1, chosen.shape[3]))
            kept = keys_in(blocks, index, tile.keys)
            whole = (own * self.segment < self.begin) | (own >= last[:, None, None])
            return kept | (whole | (place[:, None, tile.keys] == own))[:, None]

        return shown

    def criticality(self, reading: Reading) -> Tensor:
        """P of this layer, fused: (batch, kv_head, segment, block), 0 for blocks that are not before the segment.

        Left in ``reading.carried`` for the layer after it.
        """
        call, earlier = reading.call, [layer for layer in reading.carried if layer < reading.call.layer]
        high_q, low_q = self._extremes(call.query, reading, self.segment)
        high_k, low_k = self._extremes(call.key, reading, self.block)
        middle = (high_q + low_q) / 2
        middle = middle.reshape(middle.shape[0], call.key.shape[1], -1, *middle.shape[2:])  # (.., kv_head, group, ..)
        score = torch.maximum(*(middle @ k[:, :, None].transpose(3, 4) for k in (high_k, low_k))).mean(2)
        before = self._before(score)
        critical = score.masked_fill(~before, -torch.inf).softmax(-1).masked_fill(~before, 0.0)
        if self.fusion and call.layer > 1 and earlier:
            critical = self.fusion * reading.carried[max(earlier)] + (1 - self.fusion) * critical
        reading.carried[call.layer] = critical
        return critical

    def _before(self, x: Tensor) -> Tensor:
        """Which blocks are before a segment: bool (segment, block), for ``x`` (..., segment, block)."""
        segment, block = (torch.arange(n, device=x.device) for n in x.shape[-2:])
        return block * self.block < segment[:, None] * self.segment

    def _extremes(self, x: Tensor, reading: Reading, size: int) -> tuple[Tensor, Tensor]:
        """The largest and smallest value of each dimension of ``x`` (batch, head, token, d) in blocks: (batch, head,
        block, d); 0 for a block that an example has no token in."""
        x = x.to(reading.scored.dtype)
        index = blocks_of(reading, size)[:, : x.shape[2]]
        real = reading.keys[:, None, : x.shape[2], None]
        place = index[:, None, :, None].expand_as(x)
        found = []
        for least, how in ((-torch.inf, "amax"), (torch.inf, "amin")):
            whole = x.new_full((*x.shape[:2], int(index.max()) + 1, x.shape[3]), least)
            one = whole.scatter_reduce(2, place, x.masked_fill(~real, least), how)
            found.append(one.masked_fill(one.isinf(), 0.0))
        return found[0], found[1]
