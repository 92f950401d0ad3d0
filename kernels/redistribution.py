"""Mass moved between keys after softmax: what no change of scores says.

A rescale of keys *with* renormalisation is a logit bias (``attend(..., bias=log c)``, identity 5 of the design) and is
answered by every engine; any other change before softmax is a ``ScoreEdit``. Here keys C keep a share of their mass,
and takers B take up what they lose, each in proportion to its weight, while the rest R stays (identity 6). With w_S the
mass of a set before, what it has after is

    W_C = a w_C,    W_B = w_B + (1 - a) w_C,    W_R = w_R,

where a is the share that is kept, lowered to 1 + w_B / w_C where C would take more than B has. A row that sees no taker
stays as it is, and a sink logit keeps its share. That is ``freed = "onto"``. With ``"lost"`` the row loses what C loses
(or gains, where a > 1): W_C = a w_C and W_B = w_B, in every row. With ``"rescaled"`` both sets then get back the sum
that they had: W_C = t a w_C, W_B = t w_B, t = (w_C + w_B) / (a w_C + w_B).

Sources: ACT (Yu et al. 2024, arXiv 2406.15765: from a head's sinks to every other key) and VAR (Kang et al. 2025, arXiv
2503.03321: from sinks to the image's other tokens); which heads, queries and keys is their choice, and the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Freed = Literal["onto", "lost", "rescaled"]


@dataclass(frozen=True, eq=False)
class Redistribution:
    """Keys keep a share of their mass, and others take up the rest.

    ``keys`` and ``onto`` are bool, (key,) or (batch or 1, head or 1, key): which keys give, and which take, those that
    give excepted; None means every other key. ``keep`` is the share that givers keep, at least 0: a number, one a head
    (head,), or (batch or 1, head or 1, query or 1). 0 removes sinks, 1 leaves a head or a query alone, more moves mass
    onto the keys. ``freed`` says what becomes of the rest (see above).
    """

    keys: Tensor
    keep: float | Tensor = 0.0
    onto: Tensor | None = None
    freed: Freed = "onto"

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Raise ValueError where this does not fit a call of these sizes."""
        for name, x in (("keys", self.keys), ("onto", self.onto)):
            if x is not None and (x.dtype != torch.bool or not _fits(x, (batch, heads, keys))):
                shape = f"({keys},) or ({batch} or 1, {heads} or 1, {keys})"
                raise ValueError(f"{name} must be bool {shape}; got {x.dtype} {tuple(x.shape)}")
        keep = torch.as_tensor(self.keep)
        if keep.shape not in ((), (heads,)) and not (keep.dim() == 3 and _fits(keep, (batch, heads, queries))):
            shape = f"a number, ({heads},) or ({batch} or 1, {heads} or 1, {queries} or 1)"
            raise ValueError(f"keep must be {shape}; got {tuple(keep.shape)}")
        if not bool((keep >= 0).all()):
            raise ValueError("the share of their mass that keys keep must be at least 0")

    def sets(self, device: torch.device) -> list[Tensor]:
        """Givers, takers and, where there are any, the rest: bool (batch or 1, head or 1, key) each."""
        givers = _three(self.keys).to(device)
        if self.onto is None:
            return [givers, ~givers]
        takers = _three(self.onto).to(device) & ~givers
        return [givers, takers, ~(givers | takers)]

    def masses(self, before: list[Tensor], sees_taker: Tensor) -> list[Tensor]:
        """W of every set from the w before, each (batch, head, query)."""
        givers, takers = before[:2]
        keep = torch.as_tensor(self.keep, device=givers.device, dtype=givers.dtype)
        keep = keep[:, None] if keep.dim() == 1 else keep
        if self.freed == "lost":
            return [keep * givers, *before[1:]]
        if self.freed == "rescaled":
            whole, left = givers + takers, keep * givers + takers
            t = whole / torch.where(left > 0, left, 1.0)
            kept = torch.where(sees_taker, t * keep * givers, givers)
            return [kept, torch.where(left > 0, t * takers, torch.where(sees_taker, whole, 0.0)), *before[2:]]
        binds = keep * givers > givers + takers
        a = torch.where(binds, 1 + takers / torch.where(binds, givers, 1.0), keep)
        a = torch.where(sees_taker, a, 1.0)
        return [a * givers, (takers + (1 - a) * givers).clamp(min=0.0), *before[2:]]

    def of_rows(self, rows: Tensor | slice) -> Redistribution:
        """The same for some of the queries."""
        keep = self.keep
        if isinstance(keep, Tensor) and keep.dim() == 3 and keep.shape[2] > 1:
            keep = keep[:, :, rows]
        return replace(self, keep=keep)


def _fits(x: Tensor, sizes: tuple[int, int, int]) -> bool:
    if x.dim() == 1:
        return x.shape[0] == sizes[-1]
    return x.dim() == 3 and all(n in (1, size) for n, size in zip(x.shape, sizes, strict=True))


def _three(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x[None, None]


def dense(p: Tensor, move: Redistribution) -> Tensor:
    """The definition of ``redistribute``: a pattern ``p`` (batch, head, query, key) after ``move``.

    Takers whose weights are 0 in the precision of ``p`` count as not seen.
    """
    sets = [x[:, :, None] for x in move.sets(p.device)]
    before = [(p * x).sum(-1) for x in sets]
    for x, w, after in zip(sets, before, move.masses(before, before[1] > 0), strict=True):
        p = torch.where(x, p * (after / torch.where(w > 0, w, 1.0))[..., None], p)
    return p
