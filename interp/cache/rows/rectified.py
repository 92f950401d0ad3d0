"""Rectified sparse attention: critical blocks by an estimate of the whole pattern, which also repairs the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from headscope.interp.cache.blocks import keys_in
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import ONE_SEQUENCE, RowPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError
from headscope.kernels.kept import Keep
from headscope.kernels.streaming.weights import Tile


class Implicit(NamedTuple):
    """The estimate of a call, each (batch, head, block, block): column 0 are the tokens that stand alone, and row 0
    their queries. ``share`` of a row's mass; ``critical``, the blocks that are seen; ``rectifiable``, the others whose
    means stand for them well enough."""

    share: Tensor
    critical: Tensor
    rectifiable: Tensor

    @property
    def kept(self) -> Tensor:
        """R, the estimated share of mass that the sparse output stands for: (batch, head, block)."""
        return (self.share * (self.critical | ~self.rectifiable)).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Rectified(RowPolicy):
    """Every block of queries sees the fewest blocks of keys that hold ``share`` of its mass by their means.

    Rectified SpaAttn (arXiv 2511.19835; BienLuky/Rectified-SpaAttn @ 4b0aa10c, ``rectified_hunyuan_attn.py:171-390``,
    ``gapr_mask.py:4-42``). The softmax of scale * mean query . mean key, in which the first ``alone`` tokens stand for
    themselves, weighs a block of n tokens n times: the implicit attention P'. Critical are the largest P' until their
    sum is above ``share``, at least ``budget // block``, the block itself with ``neighbours`` before it, and the tokens
    that stand alone, whose own queries see everything. A mask multiplies the weights that it keeps by 1 / recall; R,
    the sum of P' over critical blocks, is its estimate, and ``output`` takes that off and adds what the other blocks'
    means give, where |q.k| of the means is above |mean |dq|.k| + |q.mean |dk|| (d: from the mean), their gain above
    their error. Blocks' means are over all of their rows: it is a pattern for reading (``at="prefill"``).

    What differs: theirs is for video, where text stands alone, blocks are neighbours in space and nothing is causal.
    Here, of text, the first tokens (sinks) stand alone, neighbours come before, P' is over blocks that begin no later
    than the queries' own, and a last block may be short [OURS].

    Args:
        block: tokens of a block.
        share: of P' that critical blocks reach.
        alone: first tokens that no mean stands for.
        neighbours: blocks before a block that it always sees.
    """

    name: ClassVar[str] = "rectified_spaattn"
    unit: ClassVar[str] = "estimated mass"
    source: ClassVar[str] = "arXiv 2511.19835; BienLuky/Rectified-SpaAttn @ 4b0aa10c"
    refused = {**ONE_SEQUENCE, "edits": "a block's keys depend on its later queries"}

    block: int = 128
    share: float = 0.5
    alone: int = 4
    neighbours: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or not 0 <= self.share <= 1 or self.alone < 0 or self.neighbours < 0:
            raise HeadscopeError(
                f"{self.name}: block is 1 or more, share from 0 to 1, alone and neighbours are 0 or more"
            )

    def rule(self, reading: Reading, budget: Budget) -> Keep:
        return self._shown(reading, self.implicit(reading, budget))

    def implicit(self, reading: Reading, budget: Budget) -> Implicit:
        """What is estimated of each block of queries, and which blocks are seen."""
        call, index = reading.call, self._index(reading)
        heads, count = call.query.shape[1], int(index.max()) + 1
        (q, dq, _), (k, dk, size) = (self._means(x, index, reading, count) for x in (call.query, call.key))
        k, dk = (x.repeat_interleave(heads // x.shape[1], 1).transpose(2, 3) for x in (k, dk))
        row = torch.arange(count, device=q.device)
        later = (row > row[:, None]) | (row == 0) | (size == 0)[:, None, None]
        single = self._alone(reading).repeat_interleave(heads // call.key.shape[1], 1)
        z = torch.cat([(q @ k).masked_fill(later, -torch.inf), q @ single.transpose(2, 3)], -1) * call.scale
        z[..., count:] = z[..., count:].masked_fill(self._missing(reading), -torch.inf)
        p = z.softmax(-1).nan_to_num()  # no block at all: row 0 where no token stands alone
        weighed = p[..., :count] * size[:, None, None]
        weighed[..., 0] = p[..., count:].sum(-1)
        share = weighed / weighed.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        value, order = share.sort(dim=-1, descending=True, stable=True)
        needed = (value.cumsum(-1) <= self.share).sum(-1) + 1
        needed = torch.maximum(needed, (budget.count(reading.count) // self.block)[:, None, None])
        rank = order.argsort(-1)
        near = (row[:, None] - row >= 0) & (row[:, None] - row <= self.neighbours)
        critical = ((rank < needed[..., None]) & ~later) | near | (row == 0) | (row[:, None] == 0)
        rectifiable = ((q @ k).abs() > (dq @ k).abs() + (q @ dk).abs()) & (row > 0)
        return Implicit(share, critical, rectifiable)

    def output(self, reading: Reading, budget: Budget) -> Tensor:
        """The rectified output R z' + sum over the others of P' mean value: (batch, head, row, d_value), z' being that
        of the sparse pattern. Rows that see everything have R = 1."""
        call, found = reading.call, self.implicit(reading, budget)
        index, keep = self._index(reading), self._shown(reading, found)
        value = self._means(call.value, index, reading, found.share.shape[-1])[0]
        value = value.repeat_interleave(call.query.shape[1] // value.shape[1], 1)
        rest = (found.share * (~found.critical & found.rectifiable)) @ value
        kept = torch.where(torch.arange(rest.shape[2], device=rest.device) == 0, 1.0, found.kept)
        v = call.value.to(rest.dtype).repeat_interleave(call.query.shape[1] // call.value.shape[1], 1)
        parts = []
        for first in range(0, call.query.shape[2], self.block):
            rows = slice(first, min(first + self.block, call.query.shape[2]))
            p = call.pattern(rows)
            p = p * keep(Tile(rows, slice(0, p.shape[-1]), p)) if callable(keep) else p
            z = (p @ v) / p.sum(-1, keepdim=True)
            place = index[:, None, rows, None]
            own = rest.gather(2, place.expand(-1, rest.shape[1], -1, rest.shape[3]))
            parts.append(kept[..., None].gather(2, place.expand(-1, rest.shape[1], -1, 1)) * z + own)
        return torch.cat(parts, 2)

    def _index(self, reading: Reading) -> Tensor:
        """The block of each token (batch, token): 0 for those that stand alone and padding, then from 1 on."""
        at = reading.at - self.alone
        return torch.where(at < 0, 0, at.clamp(min=0) // self.block + 1).long()

    def _means(self, x: Tensor, index: Tensor, reading: Reading, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Means of ``x`` (batch, head, token, d) over blocks, mean distances |x - mean| in each dimension, both (batch,
        head, block, d), and how many tokens a block has: (batch, block)."""
        real = reading.real.to(reading.scored.dtype)
        size = real.new_zeros(x.shape[0], count).scatter_add_(1, index, real)
        place, real = index[:, None, :, None].expand_as(x), real[:, None, :, None]

        def mean(y: Tensor) -> Tensor:
            sums = y.new_zeros(*y.shape[:2], count, y.shape[3]).scatter_add_(2, place, y * real)
            return sums / size.clamp(min=1)[:, None, :, None]

        wide = x.to(reading.scored.dtype)
        found = mean(wide)
        return found, mean((wide - found.gather(2, place)).abs()), size

    def _alone(self, reading: Reading) -> Tensor:
        """Keys of the tokens that stand alone: (batch, kv_head, alone, d_head)."""
        last = reading.call.key.shape[2] - 1
        place = (reading.start[:, None] + torch.arange(self.alone, device=reading.start.device)).clamp(max=last)
        key = reading.scored
        return key.gather(2, place[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))

    def _missing(self, reading: Reading) -> Tensor:
        """Which of them a short text has not: bool (batch, 1, 1, alone)."""
        tokens = reading.real.sum(-1, keepdim=True)
        return (torch.arange(self.alone, device=tokens.device) >= tokens)[:, None, None]

    def _shown(self, reading: Reading, found: Implicit) -> Keep:
        index, critical = self._index(reading), found.critical

        def shown(tile: Tile) -> Tensor:
            own = index[:, tile.rows][:, None, :, None].expand(-1, critical.shape[1], -1, critical.shape[3])
            return keys_in(critical.gather(2, own), index, tile.keys)

        return shown
