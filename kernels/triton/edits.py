"""A declared score edit inside a Triton kernel: one multiply-add a term, and the look-ups of its weight.

A kernel has few instructions to spare for a pair of a query and a key, so a pair is asked only what nothing else says:

1. Tables come within their bounds and in the kernel's units (ln 2, where a term adds to scores), -inf as a number that
   hides. What a term lacks is compiled away.
2. Whether a term may lead beyond the scores that count, or bring a hidden key back, follows from the bounds of its
   factors, on the host. Scores of the model itself are taken to be within 1e19, distances within 2^26 tokens.
3. A hidden key is one at ``FAR`` or below. A row whose maximum is there saw none; in other rows its weight is 0 anyway.
4. A tile has no more distances than rows and keys: these are read once, and pairs look them up in shared memory.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headscope.kernels import edit_terms
from headscope.kernels.score_edits import MOST, ScoreEdit
from headscope.kernels.triton.device import HIDDEN, LOG2E
from headscope.kernels.triton.features import kept

FAR = tl.constexpr(edit_terms.GONE * LOG2E.value)  # GONE in units of ln 2, above FLOOR
TERMS = tl.constexpr(MOST)
# -inf in a table: of a term's only factor; of one that is multiplied by a distance, which is 0 or more; of several
# factors, where it is above SEEN, as no other number is
ALONE, AWAY, NEVER = HIDDEN.value, 3.0 * edit_terms.GONE, 1e30
SEEN = tl.constexpr(1e15)
SIGN = tl.constexpr(edit_terms.NEVER)  # -inf among signs
OWN, TOKENS = 1e19, 2.0**26  # the largest score of the model itself, in nats; the largest distance
FINITE = 2e38  # sums of terms that stay below it are finite in float32
PAIRS, RUNS, TURNED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what ``edited`` is given


class Table(NamedTuple):
    """A table (example, head, place), float32, contiguous; the stride of a dimension of one place is None."""

    data: Tensor
    batch: int | None
    heads: int | None
    places: int | None
    first: int


class Term(NamedTuple):
    """``edit_terms.Term`` as a kernel argument: what is not None is a flag, which is 1, or what it says.

    Without ``score``, ``size`` and ``positive`` g is 1. A table stands where its flag does. ``pair`` and ``many``: two
    factors, or more, say together whether a key is hidden. ``brings``: what was hidden before might be no longer.
    ``later``: there is a term before. ``above`` and ``below``: at this end it may leave the scores that count.
    """

    score: int | None
    size: int | None
    positive: int | None
    slope: int | None
    least: int | None
    greatest: int | None
    by_query: int | None
    by_key: int | None
    by_distance: int | None
    pair: int | None
    many: int | None
    later: int | None
    brings: int | None
    above: int | None
    below: int | None
    queries: Table | None
    keys: Table | None
    distances: Table | None


class Edit(NamedTuple):
    """Terms, and ``MOST`` flags that say which there are."""

    some: tuple[int | None, ...]
    terms: tuple[Term, ...]


def argument(edit: ScoreEdit | None, device: torch.device, right: int | None) -> Edit | None:
    """The kernel argument for ``edit``, which must be declared, under a mask with this ``right``."""
    if edit is None:
        return None
    if not edit.in_kernels:
        raise ValueError("Triton kernels evaluate declared score edits alone; use the streaming engine")
    behind = right is not None and right <= 0
    given, terms, reach = edit.terms or (), [], OWN
    for number, term in enumerate(given):
        weight = edit_terms.LARGEST ** len(term.tables) * (TOKENS if term.slope else 1.0)
        reach = reach + weight if term.of == "one" else reach * (1.0 + weight)
        far = reach > -edit_terms.GONE
        limits = {
            "later": _flag(number > 0),
            "brings": _flag(term.of in ("score", "size") or weight > OWN),
            "above": _flag(far),
            "below": _flag((far and number < len(given) - 1) or reach * LOG2E.value > FINITE),
        }
        terms.append(_term(term, device, behind, limits))
        reach = min(reach, -edit_terms.GONE)
    return Edit((1,) * len(terms) + (None,) * (MOST - len(terms)), tuple(terms))


def looks_up(edit: ScoreEdit) -> bool:
    """Whether a weight of ``edit`` is looked up for every pair of a tile, not for its rows and keys."""
    return any(term.distances is not None for term in edit.terms or ())


def _term(term: edit_terms.Term, device: torch.device, behind: bool, limits: dict[str, int | None]) -> Term:
    """``behind``: no query sees a key ahead of it."""
    least, greatest = term.within or (None, None)
    factors, hides = len(term.tables) + term.slope, term.of == "one"
    away = term.slope and factors == 2 and behind
    hidden = (ALONE if factors == 1 else AWAY if away else NEVER) if hides else None
    tables: dict[str, Table | None] = {"queries": None, "keys": None, "distances": None}
    unit = LOG2E.value if hides else 1.0
    for name, x in term.tables.items():
        first = {"queries": term.first_query, "keys": term.first_key, "distances": term.first_distance}[name]
        tables[name], unit = _table(x, first, device, unit, hidden), 1.0
    return Term(
        score=_flag(term.of == "score"),
        size=_flag(term.of == "size"),
        positive=_flag(term.of == "positive"),
        slope=_flag(term.slope),
        least=least,
        greatest=greatest,
        by_query=_flag(term.queries is not None),
        by_key=_flag(term.keys is not None),
        by_distance=_flag(term.distances is not None),
        pair=_flag(hides and factors == 2 and not away),
        many=_flag(hides and factors > 2),
        **limits,
        **tables,
    )


def _flag(held: bool) -> int | None:
    return 1 if held else None


def _table(x: Tensor, first: int, device: torch.device, unit: float, hidden: float | None) -> Table:
    batch, heads, places = (None if n == 1 else n for n in x.shape)
    first = 0 if places is None else first  # one that changes with every token might be compiled anew
    return Table(_prepared(x, device, unit, hidden), batch, heads, places, first)


@kept
def _prepared(x: Tensor, device: torch.device, unit: float, hidden: float | None) -> Tensor:
    """``x`` within its bounds times ``unit``, with ``hidden``, if there is such a number, in place of -inf."""
    x = x.detach().to(device, torch.float32).resolve_neg()
    near = x.clamp(-edit_terms.LARGEST, edit_terms.LARGEST) * unit
    return (near if hidden is None else torch.where(x <= edit_terms.GONE, hidden, near)).contiguous()


@triton.jit
def edited(s, score, b, h, query, key, first, begin, KIND: tl.constexpr):
    """Scores ``s`` after the edit of ``score``; heads ``h`` and positions ``query`` and ``key`` broadcast to them.

    ``KIND``: ``RUNS``, a tile of rows that begin at position ``first`` and keys that begin at ``begin``, of one head;
    ``TURNED``, such a tile of keys and rows; ``PAIRS``, any, of keys that do not begin before ``begin``. What is hidden
    comes out at ``FAR`` or below.
    """
    if score.edited is not None:
        for n in tl.static_range(TERMS):
            if score.edit.some[n] is not None:
                s = changed(s, score.edit.terms[n], b, h, query, key, first, begin, KIND, score.bias is not None)
    return s


@triton.jit
def changed(s, term, b, h, query, key, first, begin, KIND: tl.constexpr, biased: tl.constexpr):
    """One term."""
    w = 1.0
    said = 1.0
    none: tl.constexpr = term.by_query is None and term.by_key is None
    if term.by_query is not None and KIND != TURNED:
        w, said = factor(read(term.queries, b, h, query), w, said, True, term)
    if term.by_key is not None:
        x = read_run(term.keys, b, h, key, begin, KIND == RUNS)
        w, said = factor(x, w, said, term.by_query is None or KIND == TURNED, term)
    if term.by_query is not None and KIND == TURNED:
        x = read_run(term.queries, b, h, query, first, True)
        w, said = factor(x, w, said, term.by_key is None, term)
    if term.by_distance is not None:
        w, said = factor(read_apart(term.distances, b, h, query, key, first, begin, KIND), w, said, none, term)
    if term.slope is not None:
        origin = first if KIND == TURNED else begin  # what moves with the tile then begins at 0: numbers of no tile
        apart = (query - origin).to(tl.float32) - (key - origin).to(tl.float32)
        w, said = weighted(apart, apart, w, said, False, term)
    if term.many is not None:
        said = said >= SIGN
    if term.least is not None:
        inside = (key >= query - term.greatest) & (key <= query - term.least)
        w = tl.where(inside, w, 0.0)
        if term.pair is not None or term.many is not None:
            said = said & inside
    if term.score is not None:
        new = s + w * s
    elif term.size is not None:
        new = s + w * tl.abs(s)
    elif term.positive is not None:
        new = s + w * tl.maximum(s, 0.0)
    elif none and term.by_distance is None:
        new = s + w * LOG2E
    else:
        new = s + w
    if term.pair is not None or term.many is not None:
        new = tl.where(said, HIDDEN, new)
    if term.brings is not None and (term.later is not None or biased):
        new = tl.where(s <= FAR, HIDDEN, new)
    if term.below is not None:
        new = tl.where(new <= FAR, HIDDEN, new)
    if term.above is not None:
        new = tl.minimum(new, -FAR)
    return new


@triton.jit
def factor(x, w, said, before: tl.constexpr, term):
    """``weighted`` by a number ``x`` of a table."""
    if term.pair is not None or term.many is not None:
        return weighted(x, tl.where(x > SEEN, 0.0, x), w, said, before, term)
    else:
        return weighted(x, x, w, said, before, term)


@triton.jit
def weighted(x, near, w, said, before: tl.constexpr, term):
    """The weight ``w`` times a factor, and what the factors say so far of whether they hide.

    Of a pair: what the other number has to exceed (``before`` it is seen), then whether it does. Of many: the product
    of signs.
    """
    if term.pair is not None:
        if before:
            said = tl.where(x > SEEN, 0.0, tl.where(x > 0, SEEN, float("inf")))
        else:
            said = x > said
    if term.many is not None:
        said = said * tl.where(x > SEEN, SIGN, tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)))
    return w * near, said


@triton.jit
def read(table, b, h, place):
    """A table at ``place``, clamped to it, of example ``b`` and head ``h``."""
    at = b.to(tl.int64) if table.batch is not None else b.to(tl.int64) * 0
    if table.heads is not None:
        at = at * table.heads + h
    if table.places is not None:
        at = at * table.places + tl.minimum(tl.maximum(place - table.first, 0), table.places - 1)
    return tl.load(table.data + at)


@triton.jit
def read_run(table, b, h, places, first, RUN: tl.constexpr):
    """A table at ``places`` (1, n), which are a run from ``first`` on where this is a ``RUN``.

    """
    if RUN and table.places is not None:
        n = tl.arange(0, places.shape[1])
        return tl.gather(read(table, b, h, first + n), n, 0)[None, :]
    else:
        return read(table, b, h, places)


@triton.jit
def read_apart(table, b, h, query, key, first, begin, KIND: tl.constexpr):
    """A table of distances at ``query - key``.

    A gather of one dimension stays in the layout in which scores leave the matrix unit, and its indices are constants
    of a thread; loads from memory for every pair would come in another.
    """
    if KIND == PAIRS or table.places is None:
        return read(table, b, h, query - key)
    else:
        across: tl.constexpr = KIND == RUNS
        BM: tl.constexpr = query.shape[0] if across else query.shape[1]
        BN: tl.constexpr = key.shape[1] if across else key.shape[0]
        WIDE: tl.constexpr = 2 * (BM if BM > BN else BN)
        all_of_them = read(table, b, h, first - begin - (BN - 1) + tl.arange(0, WIDE))
        n = tl.arange(0, BM * BN)
        if across:
            return tl.reshape(tl.gather(all_of_them, n // BN - n % BN + (BN - 1), 0), [BM, BN])
        else:
            return tl.reshape(tl.gather(all_of_them, n % BM - n // BM + (BN - 1), 0), [BN, BM])
