"""A declared score edit as the argument of a Triton kernel: what can be known of it before a pair is looked at.

1. Tables come within their bounds and in the kernel's units (ln 2, where a term adds to scores), -inf as a number that
   hides.
2. Whether a term may lead beyond the scores that count, or bring a hidden key back, follows from the bounds of its
   factors. A kernel asks a pair nothing else: each question costs one instruction of about twelve.

[OURS] The model's own scores are taken to be within 1e19 nats, and distances within 2^26 tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from headscope.kernels import edit_terms
from headscope.kernels.score_edits import MOST, ScoreEdit
from headscope.kernels.triton.device import HIDDEN, LOG2E
from headscope.kernels.triton.features import kept

OWN, TOKENS = 1e19, 2.0**26
FINITE = 2e38  # sums of terms that stay below it are finite in float32
# -inf in a table: of a term's only factor; of one that is multiplied by a distance, which is 0 or more; of several
# factors, where it is above SEEN and all other numbers are below
ALONE, AWAY, NEVER = HIDDEN.value, 3.0 * edit_terms.GONE, 1e30
SEEN = 1e15


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


def _term(term: edit_terms.Term, device: torch.device, behind: bool, limits: dict[str, Any]) -> Term:
    """``behind``: no query sees a key ahead of it."""
    least, greatest = term.within or (None, None)
    factors, hides = len(term.tables) + term.slope, term.of == "one"
    away = term.slope and factors == 2 and behind
    hidden = (ALONE if factors == 1 else AWAY if away else NEVER) if hides else None
    tables: dict[str, Any] = {"queries": None, "keys": None, "distances": None}
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
