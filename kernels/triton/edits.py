"""A declared score edit inside a Triton kernel: one multiply-add a term, and the look-ups of its weight.

What a term lacks is compiled away, and what is known beforehand (``edit_arguments``) is not asked. Scores are in units
of ln 2. A hidden key is one at ``FAR`` or below: a row whose maximum is there saw none, and in others its weight is 0.

A tile has no more distances than rows and keys. Those are read once, and pairs look them up in shared memory: a gather
of one dimension comes in the layout in which scores leave the matrix unit, and its indices are constants of a thread.
A tile of loads would come in another layout, by way of shared memory as well, each with an address to compute.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from headscope.kernels import edit_terms
from headscope.kernels.score_edits import MOST
from headscope.kernels.triton import edit_arguments
from headscope.kernels.triton.device import HIDDEN, LOG2E

FAR = tl.constexpr(edit_terms.GONE * LOG2E.value)  # GONE in units of ln 2, above FLOOR
SEEN = tl.constexpr(edit_arguments.SEEN)
NEVER = tl.constexpr(edit_terms.NEVER)  # a -inf among signs
TERMS = tl.constexpr(MOST)
PAIRS, RUNS, TURNED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the kinds of ``edited``


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
        origin = first if KIND == TURNED else begin  # from here what moves with the tile is the same in every tile
        apart = (query - origin).to(tl.float32) - (key - origin).to(tl.float32)
        w, said = weighted(apart, apart, w, said, False, term)
    if term.many is not None:
        said = said >= NEVER
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
        said = said * tl.where(x > SEEN, NEVER, tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)))
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
    """A table at ``places`` (1, n), which are ``first`` and what follows it where this is a ``RUN``.

    A run is read once, a place a thread, and given to those who need it: each would read a column for every pair of
    rows.
    """
    if RUN and table.places is not None:
        n = tl.arange(0, places.shape[1])
        return tl.gather(read(table, b, h, first + n), n, 0)[None, :]
    else:
        return read(table, b, h, places)


@triton.jit
def read_apart(table, b, h, query, key, first, begin, KIND: tl.constexpr):
    """A table of distances at ``query - key``."""
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
