"""Fragmentation of dates: how far a tokenizer's pieces are from year, month and day."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import pandas as pd

from headscope.interp.errors import HeadscopeError

Split = Literal["cut", "merged"]


@dataclass(frozen=True)
class Fragmentation:
    """The parts of a date's fragmentation ratio.

    Attributes:
        date: as it was written; ``pieces``, the tokenizer's; ``fields``, year, month and day and what stands between.
        split: a piece cuts fields, as ``fragmentation(split=)`` says.
        delimiter: a delimiter among the fields is no piece by itself.
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
    dates: Sequence[str],
    fields: Sequence[Sequence[str]],
    tokenize: Callable[[str], Sequence[str]],
    *,
    split: Split = "cut",
) -> list[Fragmentation]:
    """Fragmentation ratio of dates and its components.

    Bhatia, Peyrard & Zhao 2025, "Date Fragments" (arXiv 2505.16088): F = 0.10 1[split] + 0.10 1[delimiter lost] + 0.05
    (N - N_b) + 0.30 theta against a baseline that cuts a date into year, month, day and delimiters. The paper leaves
    two things open, which its own numbers for 10271606 settle in the one way that we found [OURS]. The baseline has
    delimiters also where the date has none: ("10", "/", "27", "/", "1606"), so that N_b is 5 and they are lost. And a
    split is a piece of several characters that is no whole field (``"cut"``): single digits cut nothing in this sense.
    That gives all of them: 0.40 for "102 716 06" and "1027 16 06", 0.34 for "10 27 16 06" (0.337), 0.55 for single
    digits, 0.60 with a marker before these. With three fields as the baseline the third is 0.28, or 0.18 where only a
    piece that holds parts of two fields is a split (``"merged"``); the others stay.

    What it does not show: whether the model puts the pieces together again.

    Args:
        dates: as text.
        fields: of each date, in order, what the baseline cuts it into: ("10", "/", "27", "/", "1606"), whether the date
            has these delimiters or none; or ("10", "27", "1606") of a date without, to which none are lost then.
        tokenize: a text to its pieces, which join to it (markers of a tokenizer, such as a leading space's, taken off;
            one that is a token by itself leaves an empty piece, which counts).
        split: ``"cut"`` or ``"merged"``.

    Raises:
        HeadscopeError: fields or pieces that do not join to their date, or another ``split``.
    """
    if len(dates) != len(fields):
        raise HeadscopeError(f"give fields to each date: {len(dates)} dates, {len(fields)} lists of fields")
    if split not in get_args(Split):
        raise HeadscopeError(f"split is 'cut' or 'merged', not {split!r:.40}")
    return [_one(date, tuple(parts), tuple(tokenize(date)), split) for date, parts in zip(dates, fields, strict=True)]


def to_frame(found: Sequence[Fragmentation]) -> pd.DataFrame:
    """A table, one row a date: date, pieces, split, delimiter, extra, distance, ratio."""
    names = ("date", "pieces", "split", "delimiter", "extra", "distance", "ratio")
    return pd.DataFrame([{name: getattr(one, name) for name in names} for one in found])


def _one(date: str, fields: tuple[str, ...], pieces: tuple[str, ...], split: Split) -> Fragmentation:
    if not date:
        raise HeadscopeError("a date is an empty text, which has no pieces: leave it out")
    shown = fields if "".join(fields) == date else tuple(field for field in fields if field.isalnum())
    for what, parts in (("fields", shown), ("pieces", pieces)):
        if "".join(parts) != date:
            raise HeadscopeError(f"the {what} {list(parts)} do not join to {date!r}")
    marks = Counter(field for field in fields if not field.isalnum())
    lost = bool(marks - Counter(piece for piece in pieces if not piece.isalnum()))
    one, other = Counter(pieces), Counter(fields)
    size = math.sqrt(sum(n * n for n in one.values()) * sum(n * n for n in other.values()))
    distance = 1 - sum(n * other[piece] for piece, n in one.items()) / size
    cut = _splits(shown, pieces, split)
    return Fragmentation(date, pieces, fields, cut, lost, len(pieces) - len(fields), distance)


def _splits(fields: tuple[str, ...], pieces: tuple[str, ...], split: Split) -> bool:
    words = [span for span, field in zip(_ranges(fields), fields, strict=True) if field.isalnum()]
    for first, stop in _ranges(pieces):
        shares = [(min(stop, b) - max(first, a), b - a) for a, b in words if a < stop and first < b]
        within = len(shares) == 1 and shares[0][0] in (1, shares[0][1])  # a single character, or all of one field
        if len(shares) > 1 or (split == "cut" and shares and not within):
            return True
    return False


def _ranges(parts: tuple[str, ...]) -> list[tuple[int, int]]:
    """Where each part of a text begins and ends."""
    ends = list(itertools.accumulate(map(len, parts)))
    return list(zip([0, *ends[:-1]], ends, strict=True))
