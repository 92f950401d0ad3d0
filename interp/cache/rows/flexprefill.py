"""FlexPrefill: each head's blocks by the text, as many as hold enough of the last queries' attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from headscope.interp.cache.blocks import blocks_of, heaviest, keys_in
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import ONE_SEQUENCE, RowPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError
from headscope.kernels.kept import Keep
from headscope.kernels.streaming.weights import Tile

TOKENS = 128  # by which the authors' code divides a coverage, whatever the block


class Decision(NamedTuple):
    """Of one text, bool: whether a head is query-aware (head,), and the blocks it computes (head, block, block)."""

    query_aware: Tensor
    active: Tensor


@dataclass(frozen=True, kw_only=True)
class FlexPrefill(RowPolicy):
    """Blocks of the prompt that a head computes, chosen anew for every text; the budget is the least of them.

    Lai et al. 2025 (arXiv 2502.20766; ``flex_prefill_attention.py:1574-1779`` @ a24b27bf). The pattern a of the last
    ``block`` queries gives the mass of each column and of each distance. A head is query-aware where the distance of
    Jensen and Shannon between a's blocks and those estimated from mean keys is below ``tau``; else it is
    vertical-slash. That takes the blocks of columns and of distances with most mass, as many as it needs tokens to
    reach ``gamma`` of it (divided by 128 tokens, plus one), at least the budget, the first block and the diagonal
    among them. A query-aware head takes the budget's blocks of each, and the best pairs of blocks by mean query and
    mean key until their sum reaches ``gamma`` (the one that crosses it left out). Short prompts, up to two blocks or
    the budget, are dense, and so is every row after the prompt: it is a pattern for reading (``at="prefill"``).

    Args:
        block: tokens of a block.
        gamma: share of the attention that is to be reached (0.9 in their README, 0.95 in experiments).
        tau: below which distance a head is query-aware.
    """

    name: ClassVar[str] = "flexprefill"
    unit: ClassVar[str] = "mean mass"
    source: ClassVar[str] = "Lai et al. 2025, arXiv 2502.20766; bytedance/FlexPrefill @ a24b27bf"
    refused = {**ONE_SEQUENCE, "edits": "blocks are found anew in every head, by the prompt's last queries"}

    block: int = 128
    gamma: float = 0.9
    tau: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or not 0 < self.gamma <= 1:
            raise HeadscopeError(f"{self.name}: block must be 1 or more, and gamma above 0 and at most 1")

    def rule(self, reading: Reading, budget: Budget) -> Keep:
        least = budget.count(reading.count).tolist()
        each = [self.decide(reading, b, n).active for b, n in enumerate(least)]
        most = max(x.shape[-1] for x in each)
        active = torch.stack([torch.nn.functional.pad(x, (0, most - x.shape[1], 0, most - x.shape[1])) for x in each])
        index = blocks_of(reading, self.block).clamp(max=most - 1)

        def shown(tile: Tile) -> Tensor:
            own = index[:, tile.rows][:, None, :, None].expand(-1, active.shape[1], -1, most)
            later = (reading.at[:, tile.rows] >= reading.count[:, None])[:, None, :, None]
            return keys_in(active.gather(2, own), index, tile.keys) | later

        return shown

    def decide(self, reading: Reading, example: int, least: int) -> Decision:
        """The kind and the blocks of every head for one of the texts, at least ``least`` tokens."""
        call, b = reading.call, self.block
        start, stop = int(reading.start[example]), int(reading.stop[example])
        n, heads = stop - start, call.query.shape[1]
        blocks, few = -(-n // b), -(-least // b)
        if n <= max(2 * b, few * b):
            whole = torch.ones(heads, blocks, blocks, dtype=torch.bool, device=call.query.device)
            return Decision(whole[:, 0, 0], whole.tril())
        a = call.pattern(slice(stop - b, stop))[example, :, :, start:stop]
        query, key = (self._means(x[example, :, start:stop].to(a.dtype)) for x in (call.query, call.key))
        key = key.repeat_interleave(heads // key.shape[0], 0)
        last = call.query[example, :, stop - b : stop].to(a.dtype).mean(1, keepdim=True)
        estimated = (call.scale * last @ key.transpose(1, 2))[:, 0].softmax(-1)
        vertical, slash = a.mean(1), self._slashes(a)
        columns, diagonals = (self._sums(x) for x in (vertical, slash))
        aware = _js_distance(estimated, columns) < self.tau
        counts = [self._count(x, few, blocks).masked_fill(aware, min(few, blocks)) for x in (vertical, slash)]
        columns[:, 0] = diagonals[:, -1] = torch.inf
        at = torch.arange(blocks, device=a.device)
        gap = at[:, None] - at[None, :]
        near = heaviest(diagonals, counts[1]).flip(-1)  # by distance in blocks
        active = heaviest(columns, counts[0])[:, None, :] | near[:, gap.clamp(min=0)]
        pairs = (call.scale * query @ key.transpose(1, 2)).masked_fill(gap < 0, -torch.inf).softmax(-1).flatten(1)
        value, order = pairs.sort(dim=-1, descending=True, stable=True)
        best = torch.zeros_like(pairs, dtype=torch.bool).scatter(1, order, value.cumsum(-1) <= self.gamma * blocks)
        best = best.view_as(active) & aware[:, None, None]
        best[aware, 0, 0] = True  # what is left out is mapped to the first block
        return Decision(aware, (active | best) & (gap >= 0))

    def _slashes(self, a: Tensor) -> Tensor:
        """Mean mass at each distance, the largest first: (head, n) of the last rows ``a`` (head, row, n)."""
        rows, n = a.shape[1:]
        at = torch.arange(n, device=a.device)
        query = torch.arange(n - rows, n, device=a.device)
        place = (n - 1 - (query[:, None] - at[None, :])).clamp(max=n - 1)
        found = a.new_zeros(a.shape[0], n)
        return found.scatter_add_(1, place.flatten().expand(a.shape[0], -1), a.flatten(1)) / rows

    def _sums(self, x: Tensor) -> Tensor:
        """Sums over blocks along the last axis, zeros beyond its end."""
        whole = torch.nn.functional.pad(x, (0, -x.shape[-1] % self.block))
        return whole.reshape(*x.shape[:-1], -1, self.block).sum(-1)

    def _means(self, x: Tensor) -> Tensor:
        """Means over blocks of tokens: (head, block, d) of (head, token, d); the last block may be short."""
        count = self._sums(x.new_ones(x.shape[1]))
        return self._sums(x.transpose(1, 2)).transpose(1, 2) / count[:, None]

    def _count(self, mass: Tensor, few: int, blocks: int) -> Tensor:
        """How many blocks: the tokens that reach ``gamma`` of ``mass`` (head, token), in blocks, at least ``few``."""
        covered = (mass.sort(dim=-1, descending=True).values.cumsum(-1) <= self.gamma).sum(-1) + 1
        return (covered // TOKENS + 1).clamp(min=few).clamp(max=blocks)


def _js_distance(p: Tensor, q: Tensor) -> Tensor:
    """The square root of the Jensen-Shannon divergence along the last axis, in nats; NaN where a term is 0 log 0, which
    the authors' comparison takes for far apart."""
    m = (p + q) / 2
    return torch.sqrt(0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1))
