"""Blocks of tokens, counted from each example's first: means of them, and keys of chosen ones."""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.interp.cache.reading import Reading


def blocks_of(reading: Reading, size: int) -> Tensor:
    """The block of each key of the call, (batch, key); 0 for padding to the left."""
    return (reading.at.clamp(min=0) // size).long()


def block_means(x: Tensor, reading: Reading, size: int) -> Tensor:
    """Means of ``x`` (batch, head, token, d) over the tokens of each block: (batch, head, block, d), in float32 at
    least. Padding is left out; the last block may be short."""
    index = blocks_of(reading, size)[:, : x.shape[2]]
    real = reading.real[:, : x.shape[2]].to(torch.promote_types(x.dtype, torch.float32))
    count = int(index.max()) + 1
    sums = real.new_zeros(*x.shape[:2], count, x.shape[3])
    place = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    sums.scatter_add_(2, place, x.to(real.dtype) * real[:, None, :, None])
    members = real.new_zeros(x.shape[0], count).scatter_add_(1, index, real)
    return sums / members.clamp(min=1)[:, None, :, None]


def keys_in(chosen: Tensor, index: Tensor, keys: slice) -> Tensor:
    """Which of ``keys`` lie in blocks ``chosen`` (batch, head, row, block), by their block ``index`` (batch, key)."""
    place = index[:, None, None, keys].expand(*chosen.shape[:3], -1)
    return chosen.gather(3, place)


def heaviest(score: Tensor, count: Tensor) -> Tensor:
    """The ``count`` (batch,) highest of ``score`` along its last axis, equal ones in order; never one of -inf."""
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (rank < count.view(-1, *[1] * (score.dim() - 1))) & (score > -torch.inf)
