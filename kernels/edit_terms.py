"""Declared changes of attention scores: sums that a GPU kernel evaluates in its tile, and their definition.

A ``Term`` is s' = s + w g(s) for every pair of a query and a key. The form is closed: g is one of four functions of the
score, and the weight w a product of tables of the query, of the key and of their distance. A chain of terms says what
slopes, temperatures, factors and offsets on some rows and keys, windows and knocked-out keys are; what it cannot say
stays a Python function (``headscope.kernels.score_edits``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

LARGEST = 1e9  # of a weight's factor: products of three, and of a distance, are far from what float32 ends at
GONE = -1e29  # a score at or below it is that of a hidden key, and so far from any engine's own number for one
NEVER = 1024.0  # stands for a -inf among signs

Of = Literal["one", "score", "size", "positive"]
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "score": lambda s: s,
    "size": torch.abs,
    "positive": torch.relu,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Term:
    """s' = s + w g(s), element by element, scores in nats.

    1. w is the product of what is given: ``queries`` at the query's position, ``keys`` at the key's, ``distances`` at
       query - key, and query - key itself (``slope``); 1 where nothing is. Outside ``within`` w is 0.
    2. g(s) is 1 (``of="one"``), s (``"score"``), |s| (``"size"``) or max(s, 0) (``"positive"``). So a factor f is a
       weight of f - 1 of the score, which is rounded where s is: a factor of 1e-3 keeps s to 1e-7 |s|, not to 1e-10.
    3. A key that is hidden before stays hidden. -inf in the tables of ``of="one"`` hides a key, for good, wherever the
       product of w's other factors is above 0, however little, and changes nothing elsewhere.
       [OURS] Another factor of -inf counts as above 0.
    4. [OURS] So that no engine meets infinities or what rounds to them: a table's number of -1e29 or less counts as
       -inf, another beyond 1e9 in size as 1e9 with its sign (as -inf does in the tables of other g, where it hides
       nothing); a score of -1e29 or less hides its key, and one of 1e29 or more counts as 1e29. Kernels take the scores
       that the model itself computes to be within 1e19, and distances to be within 2^26 tokens.
    5. Kernels compute masses of columns and targets as exp(s - lse) in float32, right to about |s| 2^-22 of the
       mass: of scores beyond 1e6 they say nothing, and may be above 1.

    What kernels make of a table is kept while the table lives and stays as it is: give a new one rather than change its
    numbers behind torch's back (``.data``, ``from_numpy``).

    Args:
        of: g.
        queries: (batch or 1, head or 1, query or 1), from position ``first_query`` on.
        keys: (batch or 1, head or 1, key or 1), from position ``first_key`` on.
        distances: (batch or 1, head or 1, distance) in tokens, from ``first_distance`` on; before and behind the table
            its first and its last hold.
        slope: whether w is multiplied by query - key.
        within: the least and the greatest query - key, in tokens, of the pairs that are changed.

    Raises:
        ValueError: another g, or a table of other dimensions.
    """

    of: Of = "one"
    queries: Tensor | None = None
    keys: Tensor | None = None
    distances: Tensor | None = None
    first_query: int = 0
    first_key: int = 0
    first_distance: int = 0
    slope: bool = False
    within: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.of not in FUNCTIONS:
            raise ValueError(f"a term is of {', '.join(FUNCTIONS)}, not of {self.of!r}")
        for name, table in self.tables.items():
            if table.dim() != 3:
                raise ValueError(f"{name} of a term must be (batch or 1, head or 1, place); got {tuple(table.shape)}")

    @property
    def tables(self) -> dict[str, Tensor]:
        """The tables that it has, by name."""
        given = {name: getattr(self, name) for name in ("queries", "keys", "distances")}
        return {name: table for name, table in given.items() if table is not None}

    def of_part(self, examples: slice, heads: slice) -> Term:
        """The same for a part of the call's examples and heads."""

        def mine(x: Tensor) -> Tensor:
            x = x if x.shape[0] == 1 else x[examples]
            return x if x.shape[1] == 1 else x[:, heads]

        parts: dict[str, Any] = {name: mine(table) for name, table in self.tables.items()}
        return replace(self, **parts)

    def on_heads(self, chosen: Tensor) -> Term:
        """The same where ``chosen`` (head,) is True, and nothing elsewhere."""
        own = chosen[None, :, None]
        given = torch.ones(1, 1, 1, device=chosen.device) if self.queries is None else self.queries
        return replace(self, queries=torch.where(own, given, given.new_zeros(())))

    def check(self, batch: int, heads: int, places: dict[str, tuple[int, int]]) -> None:
        """Raise ValueError where its tables are not of a call's examples, heads and positions (``places`` by name)."""
        for name, table in self.tables.items():
            count = table.shape[2]
            first, stop = places.get(name, (0, 1))
            none = not count and first < stop
            if table.shape[0] not in (1, batch) or table.shape[1] not in (1, heads) or none:
                raise ValueError(
                    f"{name} of a score edit must be ({batch} or 1, {heads} or 1, place); got {tuple(table.shape)}"
                )
            begins = self.first_query if name == "queries" else self.first_key
            if name in places and first < stop and count > 1 and not begins <= first <= stop <= begins + count:
                raise ValueError(
                    f"{name} of a score edit are of positions {begins}:{begins + count}; the call has {first}:{stop}"
                )

    def function(self) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The definition: (score, example, head, query, key) -> score, made of pointwise operations and look-ups."""
        queries, keys, distances = (_lookup(getattr(self, name)) for name in ("queries", "keys", "distances"))
        first_query, first_key, first_distance = self.first_query, self.first_key, self.first_distance
        slope, within, g, hides = self.slope, self.within, FUNCTIONS[self.of], self.of == "one"

        def changed(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            s = s.to(torch.promote_types(s.dtype, torch.float32))
            apart = q - k
            w = apart.to(s.dtype) if slope else None
            sign = None if w is None else torch.sign(w)
            for table, place in (
                (queries, q - first_query),
                (keys, k - first_key),
                (distances, apart - first_distance),
            ):
                if table is not None:
                    own = table(b, h, place).to(s.dtype)
                    signs, own = _signs_and_sizes(own, hides)
                    w, sign = (own, signs) if w is None or sign is None else (w * own, sign * signs)
            w = s.new_ones(()) if w is None else w
            gone = s <= GONE
            own = torch.where(gone, 0.0, s)  # -inf times a weight has no gradient
            if hides and sign is not None:
                gone = gone | ((sign >= NEVER) if within is None else (sign >= NEVER) & _inside(apart, within))
            if within is not None:
                w = torch.where(_inside(apart, within), w, 0.0)
            new = (own + w * g(own)).clamp(max=-GONE)
            return torch.where(gone | (new <= GONE), -torch.inf, new)

        return changed


def _inside(apart: Tensor, within: tuple[int, int]) -> Tensor:
    return (apart >= within[0]) & (apart <= within[1])


def _signs_and_sizes(x: Tensor, hides: bool) -> tuple[Tensor, Tensor]:
    """A factor's sign, ``NEVER`` in place of -inf, and the factor within bounds, 0 in place of an -inf that ``hides``.

    The product of signs says whether one of factors is above 0 that is rounded to 0.
    """
    near = x.clamp(-LARGEST, LARGEST)
    never = x <= GONE
    return torch.where(never, NEVER, torch.sign(x)), torch.where(never, 0.0, near) if hides else near


def _lookup(table: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """``table`` (batch or 1, head or 1, place) at index tensors that broadcast."""
    if table is None:
        return None
    batch, heads, count = table.shape
    wide = torch.promote_types(table.dtype, torch.float32)

    def read(b: Tensor, h: Tensor, place: Tensor) -> Tensor:
        return table[b if batch > 1 else 0, h if heads > 1 else 0, place.clamp(0, count - 1)].to(wide)

    return read
