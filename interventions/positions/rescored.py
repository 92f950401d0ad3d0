"""Scores of an attention call from other queries and keys, tile by tile, on the rows that an edit means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall

# (slot, examples, heads, rows), each index 1-D -> queries (example, head, row, d)
Queries = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Rescored:
    """What a score is when row i meets key j as ``queries(slot of j)[i] . key[j]``, then softcap and key bias.

    ``key`` (batch, kv_head, key, d); ``slot`` (batch or 1, key) says which queries meet a key, None: all the first.
    Called as a ``ScoreFunction`` on whole tiles (or on a few keys of every row, as targets are).
    """

    call: AttentionCall
    queries: Queries
    key: Tensor
    slot: Tensor | None = None

    def __post_init__(self) -> None:
        ranges = {0: (0, self.key.shape[2])}
        if self.slot is not None:
            at = torch.arange(self.slot.shape[1], device=self.slot.device)
            ranges = {}
            for slot in range(int(self.slot.max()) + 1):
                held = at[(self.slot == slot).any(0)]
                if len(held):
                    ranges[slot] = int(held[0]), int(held[-1]) + 1
        object.__setattr__(self, "_ranges", ranges)

    def __call__(self, s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mask = self.call.mask
        examples, heads = b.reshape(-1), h.reshape(-1)
        rows, keys = q.reshape(-1) - mask.query_offset, k - mask.key_offset
        raw = self._tile if keys.numel() == keys.shape[-1] else self._picked
        new = raw(s, examples, heads, rows, keys) * self.call.scale
        if self.call.softcap is not None:
            new = self.call.softcap * torch.tanh(new / self.call.softcap)
        bias = self.call.key_bias
        if bias is not None:
            new = new + bias[b if bias.shape[0] > 1 else 0, h if bias.shape[1] > 1 else 0, keys].to(new.dtype)
        return new

    def _tile(self, s: Tensor, examples: Tensor, heads: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
        """q.k of rows and keys: (example, head, row, key)."""
        keys = keys.reshape(-1)
        out = torch.zeros_like(s)
        mine = self.key[examples][:, self._shared(heads)][:, :, keys].to(s.dtype).transpose(2, 3)
        for slot, (first, stop) in self._slots().items():
            inside = ((keys >= first) & (keys < stop)).nonzero()[:, 0]
            if not len(inside):
                continue
            part = slice(int(inside[0]), int(inside[-1]) + 1)
            new = self.queries(slot, examples, heads, rows).to(s.dtype) @ mine[..., part]
            if self.slot is not None:
                held = self._of(examples)[:, keys[part]] == slot
                new = torch.where(held[:, None, None], new, out[..., part])
            out = new if new.shape == out.shape else torch.cat([out[..., : part.start], new, out[..., part.stop :]], -1)
        return out

    def _picked(self, s: Tensor, examples: Tensor, heads: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
        """q.k of every row and some keys of its own, ``keys`` (example, 1 or head, row, t): like ``s``."""
        keys = keys.expand(s.shape)
        each = torch.arange(len(examples), device=keys.device)[:, None, None, None]
        mine = self.key[examples][:, self._shared(heads)].to(s.dtype)
        mine = mine[each, torch.arange(len(heads), device=keys.device)[:, None, None], keys]  # (..., row, t, d)
        out = torch.zeros_like(s)
        for slot in self._slots():
            new = (self.queries(slot, examples, heads, rows).to(s.dtype)[..., None, :] * mine).sum(-1)
            held = keys == keys if self.slot is None else self._of(examples)[each, keys] == slot
            out = torch.where(held, new, out)
        return out

    def _shared(self, heads: Tensor) -> Tensor:
        return heads // (self.call.query.shape[1] // self.key.shape[1])

    def _of(self, examples: Tensor) -> Tensor:
        assert self.slot is not None
        return self.slot[examples] if self.slot.shape[0] > 1 else self.slot.expand(len(examples), -1)

    def _slots(self) -> dict[int, tuple[int, int]]:
        found: dict[int, tuple[int, int]] = vars(self)["_ranges"]
        return found


def mixed(old: Tensor, new: Tensor, before: Tensor, after: Tensor, share: float) -> Tensor:
    """Scores between ``old``, of pairs seen ``before``, and ``new``, of those seen ``after``, at 0 < share < 1: a pair
    of both moves along, one that comes has ``share`` of its weight, and one that goes 1 - ``share`` of it."""
    moved = torch.lerp(old, new, share)
    return torch.where(before & after, moved, torch.where(after, new + math.log(share), old + math.log1p(-share)))
