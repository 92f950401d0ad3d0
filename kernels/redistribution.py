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

Several follow one another as ``Redistributions``: the second moves mass of the pattern that the first made. Wherever a
set of one meets a set of the next, the pattern stays in proportion to the softmax, so that these cells are sets too.

[OURS] Takers are the keys that a row sees, whether or not an earlier move left them anything: keys that hold nothing
take in proportion to what they held last. So it makes no difference whether a move takes all that keys have or all but
a rounding of it, and no precision decides it.

Sources: ACT (Yu et al. 2024, arXiv 2406.15765: from a head's sinks to every other key) and VAR (Kang et al. 2025, arXiv
2503.03321: from sinks to the image's other tokens); which heads, queries and keys is their choice, and the caller's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
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
        keep = self.keep  # a number stays one: a copy of it to the device would wait for all that is queued there
        if isinstance(keep, Tensor):
            keep = keep.to(givers)
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
        left = (takers + (1 - a) * givers).clamp(min=0.0)
        return [a * givers, torch.where(binds & sees_taker, 0.0, left), *before[2:]]  # all is taken: no rounding of it

    def after(self, norms: list[Tensor], sinks: Tensor | None) -> list[Tensor]:
        """W of every set from the lse of its scores (batch, head, query), and a sink logit (head,)."""
        return self.masses(shares(norms, sinks), norms[1] > -torch.inf)

    def of_rows(self, rows: Tensor | slice) -> Redistribution:
        """The same for some of the queries."""
        keep = self.keep
        if isinstance(keep, Tensor) and keep.dim() == 3 and keep.shape[2] > 1:
            keep = keep[:, :, rows]
        return replace(self, keep=keep)

    def of_heads(self, heads: slice) -> Redistribution:
        """The same for some of the heads."""

        def mine(x: Tensor) -> Tensor:
            return x[:, heads] if x.dim() == 3 and x.shape[1] > 1 else x

        keep = torch.as_tensor(self.keep)
        keep = keep[heads] if keep.dim() == 1 else mine(keep)
        return replace(self, keys=mine(self.keys), keep=keep, onto=None if self.onto is None else mine(self.onto))

    def then(self, later: Redistribution) -> Redistributions:
        """This, and ``later`` on the pattern that it gives."""
        return Redistributions((self, later))

    @property
    def parts(self) -> tuple[Redistribution, ...]:
        """Itself alone."""
        return (self,)


@dataclass(frozen=True, eq=False)
class Redistributions:
    """``parts`` one after the other, each on the pattern that those before it gave.

    Its sets are the cells in which a set of every part meets: at most three times as many with each part.
    """

    parts: tuple[Redistribution, ...]

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Raise ValueError where one of them does not fit a call of these sizes."""
        for part in self.parts:
            part.check(batch, heads, queries, keys)

    def sets(self, device: torch.device) -> list[Tensor]:
        """The cells: bool (batch or 1, head or 1, key) each."""
        cells = itertools.product(*(part.sets(device) for part in self.parts))
        return [reduce(torch.logical_and, cell) for cell in cells]

    def after(self, norms: list[Tensor], sinks: Tensor | None) -> list[Tensor]:
        """W of every cell from the lse of its scores (batch, head, query), and a sink logit (head,).

        Logarithms are kept between parts, so that a cell whose mass no float holds is still told from one without:
        ``logs`` of what cells hold, and ``last`` of what they held when they last held something.
        """
        logs, own = norms, [] if sinks is None else [sinks.to(norms[0].dtype)[None, :, None].expand_as(norms[0])]
        total = _log_sum([*norms, *own])
        last = [log - total.masked_fill(total == -torch.inf, 0.0) for log in norms]
        counts = [len(part.sets(norms[0].device)) for part in self.parts]
        places = list(itertools.product(*map(range, counts)))
        for i, part in enumerate(self.parts):

            def of_sets(cells: list[Tensor], i: int = i) -> list[Tensor]:
                each = ([x for x, at in zip(cells, places, strict=True) if at[i] == n] for n in range(counts[i]))
                return [_log_sum(own) for own in each]

            held, once = of_sets(logs), of_sets(last)
            before = [log.exp() for log in held] if i else shares(held, sinks)
            mass = part.masses(before, once[1] > -torch.inf)
            scaled = []
            for log, old, at in zip(logs, last, places, strict=True):
                n, holds = at[i], held[at[i]] > -torch.inf
                whole = torch.where(holds, held[n], once[n])
                scaled.append(_scaled(torch.where(holds, log, old), whole, mass[n]))
            logs = scaled
            last = [torch.where(log > -torch.inf, log, old) for log, old in zip(logs, last, strict=True)]
        return [log.exp() for log in logs]

    def of_rows(self, rows: Tensor | slice) -> Redistributions:
        """The same for some of the queries."""
        return self._each(lambda part: part.of_rows(rows))

    def of_heads(self, heads: slice) -> Redistributions:
        """The same for some of the heads."""
        return self._each(lambda part: part.of_heads(heads))

    def then(self, later: Redistribution) -> Redistributions:
        """These, and ``later`` on the pattern that they give."""
        return Redistributions((*self.parts, later))

    def _each(self, change: Callable[[Redistribution], Redistribution]) -> Redistributions:
        return Redistributions(tuple(change(part) for part in self.parts))


Move = Redistribution | Redistributions


def shares(norms: list[Tensor], sinks: Tensor | None) -> list[Tensor]:
    """w of every set from its lse (batch, head, query); a softmax, so that they sum to one at any lse."""
    whole = torch.stack(norms, -1)
    empty = (whole == -torch.inf).all(-1, keepdim=True)
    if sinks is not None:
        own = sinks.to(whole.dtype)[None, :, None, None].expand(*whole.shape[:3], 1)
        whole = torch.cat([whole, own], -1)
    share = whole.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return list(share.unbind(-1))[: len(norms)]


def _log_sum(logs: list[Tensor]) -> Tensor:
    """The logarithm of a sum; -inf where every term is, also in a gradient."""
    whole = torch.stack(logs, -1)
    none = (whole == -torch.inf).all(-1)
    return whole.masked_fill(none[..., None], 0.0).logsumexp(-1).masked_fill(none, -torch.inf)


def _scaled(log: Tensor, of_set: Tensor, mass: Tensor) -> Tensor:
    """The logarithm of a cell's mass when its set has ``mass`` instead of exp(of_set)."""
    none = (log == -torch.inf) | (mass <= 0)
    share = log.masked_fill(none, 0.0) - of_set.masked_fill(none, 0.0)
    return (share + mass.masked_fill(none, 1.0).log()).masked_fill(none, -torch.inf)


def _fits(x: Tensor, sizes: tuple[int, int, int]) -> bool:
    if x.dim() == 1:
        return x.shape[0] == sizes[-1]
    return x.dim() == 3 and all(n in (1, size) for n, size in zip(x.shape, sizes, strict=True))


def _three(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x[None, None]


def dense(p: Tensor, move: Move) -> Tensor:
    """The definition of ``redistribute``: a pattern ``p`` (batch, head, query, key) after ``move``.

    Keys whose weights are 0 in the precision of ``p`` count as not seen.
    """
    last = p  # what each key holds, or held when it last held something
    for part in move.parts:
        sets = [x[:, :, None] for x in part.sets(p.device)]
        before, once = ([(held * x).sum(-1) for x in sets] for held in (p, last))
        masses = part.masses(before, once[1] > 0)
        for x, w, seen, after in zip(sets, before, once, masses, strict=True):
            by = torch.where(w > 0, after / torch.where(w > 0, w, 1.0), after / torch.where(seen > 0, seen, 1.0))
            p = torch.where(x, torch.where((w > 0)[..., None], p, last) * by[..., None], p)
        last = torch.where(p > 0, p, last)
    return p
