"""Fragmentation of dates: how far a tokenizer's pieces are from year, month and day."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from headscope.interp.errors import HeadscopeError


@dataclass(frozen=True)
class Fragmentation:
    """The parts of a date's fragmentation ratio.

    Attributes:
        date: as it was written; ``pieces``, the tokenizer's; ``fields``, year, month and day and what stands between.
        split: a piece holds digits of two fields.
        delimiter: a delimiter of the date is no piece by itself.
        extra: pieces beyond the fields, N - N_b; it may be negative.
        distance: theta = 1 - cosine between the counts of pieces and of fields, in [0, 1].
    """

    date: str
    pieces: tuple[str, ...]
    fields: tuple[str, ...]
    split: bool
    delimiter: bool
    extra: int
    distance: float

    @property
    def ratio(self) -> float:
        """F = 0.10 split + 0.10 delimiter + 0.05 extra + 0.30 distance."""
        return 0.10 * self.split + 0.10 * self.delimiter + 0.05 * self.extra + 0.30 * self.distance


def fragmentation(
    dates: Sequence[str], fields: Sequence[Sequence[str]], tokenize: Callable[[str], Sequence[str]]
) -> list[Fragmentation]:
    """Fragmentation ratio of dates and its components.

    Bhatia, Peyrard & Zhao 2025, "Date Fragments" (arXiv 2505.16088): F = 0.10 1[split] + 0.10 1[delimiter lost] + 0.05
    (N - N_b) + 0.30 theta against a baseline that cuts a date into year, month, day and its delimiters. Their indicator
    of a split is not defined in full: here a piece that holds parts of two fields [OURS], which gives their 0.40 for
    "102 716 06" and 0.55 for single digits; their 0.34 for "10 27 16 06" (0.18 here) follows from no reading that we
    know, so the components are kept apart. Their cosine is of pieces' counts.

    What it does not show: whether the model puts the pieces together again.

    Args:
        dates: as text.
        fields: of each date, in order, what the baseline cuts it into: ("10", "27", "1606"), or with delimiters
            ("10", "/", "27", "/", "1606").
        tokenize: a text to its pieces, which join to it (markers of a tokenizer, such as a leading space's, taken off).

    Raises:
        HeadscopeError: fields or pieces that do not join to their date.
    """
    if len(dates) != len(fields):
        raise HeadscopeError(f"give fields to each date: {len(dates)} dates, {len(fields)} lists of fields")
    return [_one(date, tuple(parts), tuple(tokenize(date))) for date, parts in zip(dates, fields, strict=True)]


def to_frame(found: Sequence[Fragmentation]) -> pd.DataFrame:
    """A table, one row a date: date, pieces, split, delimiter, extra, distance, ratio."""
    names = ("date", "pieces", "split", "delimiter", "extra", "distance", "ratio")
    return pd.DataFrame([{name: getattr(one, name) for name in names} for one in found])


def _one(date: str, fields: tuple[str, ...], pieces: tuple[str, ...]) -> Fragmentation:
    for what, parts in (("fields", fields), ("pieces", pieces)):
        if "".join(parts) != date:
            raise HeadscopeError(f"the {what} {list(parts)} do not join to {date!r}")
    words = [(first, stop) for (first, stop), field in zip(_ranges(fields), fields, strict=True) if field.isalnum()]
    held = [sum(a < stop and first < b for first, stop in words) for a, b in _ranges(pieces)]
    marks = [field for field in fields if not field.isalnum()]
    lost = bool(Counter(marks) - Counter(piece for piece in pieces if not piece.isalnum()))
    one, other = Counter(pieces), Counter(fields)
    size = math.sqrt(sum(n * n for n in one.values()) * sum(n * n for n in other.values()))
    distance = 1 - sum(n * other[piece] for piece, n in one.items()) / size
    return Fragmentation(date, pieces, fields, max(held, default=0) > 1, lost, len(pieces) - len(fields), distance)


def _ranges(parts: tuple[str, ...]) -> list[tuple[int, int]]:
    """Where each part of a text begins and ends."""
    ends = list(itertools.accumulate(map(len, parts)))
    return list(zip([0, *ends[:-1]], ends, strict=True))
