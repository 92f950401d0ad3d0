"""KeyDiff: keys that differ from the mean direction of all keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import KeyPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError


@dataclass(frozen=True, kw_only=True)
class KeyDiff(KeyPolicy):
    """Minus the cosine between a key and the mean of all keys' directions: unlike keys are kept.

    anchor = mean_t K_t / |K_t|, s_t = -cos(K_t, anchor), keys after position embedding (Park et al. 2025, arXiv
    2504.15364; kvpress's ``keydiff_press.py:45-46`` @ 8bb29b9c). No query is read.

    ``block``: as the paper runs it under a memory limit (``block_press.py:49-98``): the first n tokens are kept to
    begin with, and then for every block of so many new tokens the kept and the new are scored among themselves, with an
    anchor of their own, and the best n stay. 0: all keys at once.

    Args:
        block: tokens of a block, 0 for none.
    """

    name: ClassVar[str] = "keydiff"
    unit: ClassVar[str] = "-cosine"
    source: ClassVar[str] = "Park et al. 2025, arXiv 2504.15364; NVIDIA/kvpress @ 8bb29b9c"

    block: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 0 or (self.block and (self.sink or self.recent)):
            raise HeadscopeError(f"{self.name}: block must be 0 or more, and goes without sink and recent")

    def scores(self, reading: Reading) -> Tensor:
        return unlike(reading.scored, reading.keys[:, None])

    def sets(self, reading: Reading, budgets: Sequence[Budget]) -> list[Tensor]:
        if not self.block:
            return super().sets(reading, budgets)
        return [self._block_by_block(reading, budget) for budget in budgets]

    def _block_by_block(self, reading: Reading, budget: Budget) -> Tensor:
        """What stays after the last block: bool (batch, kv_head, key)."""
        key = reading.scored
        kept = torch.zeros(key.shape[:3], dtype=torch.bool, device=key.device)
        many = torch.minimum(budget.count(reading.count), reading.count)
        for b, (first, stop, n) in enumerate(zip(reading.start, reading.stop, many, strict=True)):
            held = torch.arange(int(first), int(first + n), device=key.device).expand(key.shape[1], -1)
            for begin in range(int(first + n), int(stop), self.block):
                new = torch.arange(begin, min(begin + self.block, int(stop)), device=key.device)
                held = torch.cat([held, new.expand(key.shape[1], -1)], -1)
                own = key[b].gather(1, held[..., None].expand(-1, -1, key.shape[-1]))
                score = unlike(own, torch.ones_like(held, dtype=torch.bool))
                best = score.argsort(dim=-1, descending=True, stable=True)[:, : int(n)]
                held = held.gather(1, best.sort(-1).values)  # in the order of the text, for ties
            kept[b].scatter_(1, held, True)
        return kept


def unlike(key: Tensor, real: Tensor) -> Tensor:
    """-cos of every key (..., key, d) with the mean direction of those that are ``real`` (..., key)."""
    direction = torch.nn.functional.normalize(key, dim=-1)
    count = real.sum(-1, keepdim=True)[..., None]
    anchor = (direction * real[..., None]).sum(-2, keepdim=True) / count
    return -torch.nn.functional.cosine_similarity(key, anchor, dim=-1)
