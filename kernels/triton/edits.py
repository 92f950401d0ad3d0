"""A declared score edit inside a Triton kernel: one multiply-add a term, and the look-ups of its weight.

What a term lacks is compiled away. Scores are in units of ln 2: what is of the score itself needs no conversion.
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

LARGEST = tl.constexpr(edit_terms.LARGEST)
GONE = tl.constexpr(edit_terms.GONE)
FAR = tl.constexpr(edit_terms.GONE * LOG2E.value)  # GONE in units of ln 2, above FLOOR
NEVER = tl.constexpr(edit_terms.NEVER)
TERMS = tl.constexpr(MOST)


class Table(NamedTuple):
    """A table (example, head, place), float32, contiguous; the stride of a dimension of one place is None."""

    data: Tensor
    batch: int | None
    heads: int | None
    places: int | None
    first: int


class Term(NamedTuple):
    """``edit_terms.Term`` as a kernel argument: what is not None is a flag, which is 1, or what it says.

    Without ``score``, ``size`` and ``positive`` g is 1. A table stands where its flag does.
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
    queries: Table | None
    keys: Table | None
    distances: Table | None


class Edit(NamedTuple):
    """Terms, and ``MOST`` flags that say which there are."""

    some: tuple[int | None, ...]
    terms: tuple[Term, ...]


def argument(edit: ScoreEdit | None, device: torch.device) -> Edit | None:
    """The kernel argument for ``edit``, which must be declared."""
    if edit is None:
        return None
    if not edit.in_kernels:
        raise ValueError("Triton kernels evaluate declared score edits alone; use the streaming engine")
    terms = edit.terms or ()
    return Edit((1,) * len(terms) + (None,) * (MOST - len(terms)), tuple(_term(each, device) for each in terms))


def looks_up(edit: ScoreEdit) -> bool:
    """Whether a weight of ``edit`` is looked up for every pair of a tile, not for its rows and keys."""
    return any(term.distances is not None for term in edit.terms or ())


def _term(term: edit_terms.Term, device: torch.device) -> Term:
    least, greatest = term.within or (None, None)
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
        queries=_table(term.queries, term.first_query, device),
        keys=_table(term.keys, term.first_key, device),
        distances=_table(term.distances, term.first_distance, device),
    )


def _flag(held: bool) -> int | None:
    return 1 if held else None


def _table(x: Tensor | None, first: int, device: torch.device) -> Table | None:
    if x is None:
        return None
    batch, heads, places = (None if n == 1 else n for n in x.shape)
    first = 0 if places is None else first  # one that changes with every token might be compiled anew
    return Table(x.detach().to(device, torch.float32).contiguous().resolve_neg(), batch, heads, places, first)


@triton.jit
def edited(s, score, b, h, query, key):
    """Scores ``s`` after the edit of ``score``; heads ``h`` and positions ``query`` and ``key`` broadcast to them."""
    if score.edited is not None:
        for n in tl.static_range(TERMS):
            if score.edit.some[n] is not None:
                s = changed(s, score.edit.terms[n], b, h, query, key)
    return s


@triton.jit
def changed(s, term, b, h, query, key):
    """One term. What is hidden, before or by it, is so by a finite number."""
    w = 1.0
    sign = 1.0
    hides: tl.constexpr = term.score is None and term.size is None and term.positive is None
    if term.slope is not None:
        w = (query - key).to(tl.float32)
        if hides:
            sign = signs(w)
    if term.by_query is not None:
        x = read(term.queries, b, h, query)
        w = w * bounded(x, hides)
        if hides:
            sign = sign * signs(x)
    if term.by_key is not None:
        x = read(term.keys, b, h, key)
        w = w * bounded(x, hides)
        if hides:
            sign = sign * signs(x)
    if term.by_distance is not None:
        x = read(term.distances, b, h, query - key)
        w = w * bounded(x, hides)
        if hides:
            sign = sign * signs(x)
    if term.least is not None:
        inside = (query - key >= term.least) & (query - key <= term.greatest)
        w = tl.where(inside, w, 0.0)
        if hides:
            sign = tl.where(inside, sign, 0.0)
    if term.score is not None:
        new = s + w * s
    elif term.size is not None:
        new = s + w * tl.abs(s)
    elif term.positive is not None:
        new = s + w * tl.maximum(s, 0.0)
    else:
        new = tl.where(sign >= NEVER, HIDDEN, s + w * LOG2E)
    new = tl.where((s <= FAR) | (new <= FAR), HIDDEN, new)
    return tl.minimum(new, -FAR)


@triton.jit
def bounded(x, hides: tl.constexpr):
    """A factor of a weight; 0 in place of -inf in a term that ``hides`` by it."""
    near = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    if hides:
        near = tl.where(x <= GONE, 0.0, near)
    return near


@triton.jit
def signs(x):
    """1, 0 or -1, and ``NEVER`` in place of -inf."""
    return tl.where(x <= GONE, NEVER, tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)))


@triton.jit
def read(table, b, h, place):
    """A table at ``place``, clamped to it, of example ``b`` and head ``h``."""
    at = b.to(tl.int64) if table.batch is not None else b.to(tl.int64) * 0
    if table.heads is not None:
        at = at * table.heads + h
    if table.places is not None:
        at = at * table.places + tl.minimum(tl.maximum(place - table.first, 0), table.places - 1)
    return tl.load(table.data + at)
