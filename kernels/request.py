"""What to compute in one pass over attention, and what comes back."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from operator import index
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """What to reduce over queries, one number a key: of the rows ``queries = (first, stop)`` of the call (None: all),
    padded ones left out, ``sum_i p_ij``, ``max_i p_ij``, and the ``count`` of those that the mask lets see the key.
    """

    queries: tuple[int, int] | None = None
    sum: bool = False
    max: bool = False
    count: bool = False

    def __post_init__(self) -> None:
        if type(self.queries) is not tuple and self.queries is not None:  # a list tells no kinds of calls apart
            object.__setattr__(self, "queries", _numbers("queries of columns", self.queries))

    def rows(self, queries: int) -> tuple[int, int]:
        """The rows of a call with so many ``queries``."""
        return self.queries or (0, queries)

    @property
    def weighs(self) -> bool:
        """Whether the pattern is needed: a count follows from the mask."""
        return self.sum or self.max


@dataclass(frozen=True, eq=False)
class Request:
    """The reductions wanted from one attention call. Only what is asked for is computed.

    Rows (one number per query):
        ``lse``: logsumexp of the scores (nats), a sink logit included.
        ``max``: the largest visible score (after softcap, bias and edit; a sink logit is not a key).
        ``entropy``: ``-sum_j p_j log p_j`` over the keys, in nats. With a sink logit the row sums to less than one and
        the sink's own term is left out, as it is left out of the pattern.
        ``linear``: ``sum_j p_ij F_jn`` for the columns of ``linear`` (key, n) or (batch, key, n): spans, sinks.
        ``distance``: ``sum_j p_ij (q_i - k_j)`` in tokens, of absolute positions.
        ``windows``: for each ``w``, the mass on keys with ``0 <= q - k < w`` and ``sum_j p_ij min(q_i - k_j, w)``.
        ``top``: the ``k`` heaviest keys (1: the argmax), heaviest first, equal ones in any order: masses and key
            *positions* (-1 where a row sees fewer keys).
        ``targets``: mass on given key positions, (batch or 1, query, t) integers, negative meaning none.
        ``query_rows``: query row indices (n,) ascending to which row statistics are limited; None means all.

    Columns (one number per key): ``columns``, one ``Columns`` for every range of queries.

    ``output``: also return ``sum_j p_ij v_j``.

    Empty rows (a query that sees no key; defined, not accidental): lse and max are ``-inf``, every other row statistic
    and the output are 0, top positions are -1, and the row adds nothing to any column.
    """

    output: bool = True
    lse: bool = False
    max: bool = False
    entropy: bool = False
    linear: Tensor | None = None
    distance: bool = False
    windows: tuple[int, ...] = ()
    top: int = 0
    targets: Tensor | None = None
    query_rows: Tensor | None = None
    columns: tuple[Columns, ...] = ()

    def __post_init__(self) -> None:
        if type(self.windows) is not tuple:
            object.__setattr__(self, "windows", _numbers("windows", self.windows))
        if type(self.columns) is not tuple:
            object.__setattr__(self, "columns", _each("columns", self.columns))

    @property
    def numbers(self) -> tuple[Hashable, ...]:
        """What tells requests apart beside ``tensors``."""
        rows = self.lse, self.max, self.entropy, self.distance, self.windows, self.top
        return self.output, *rows, self.columns

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What it holds on the device."""
        return self.linear, self.targets, self.query_rows

    @property
    def wants_rows(self) -> bool:
        """Whether any row statistic is asked for."""
        asked = (self.lse, self.max, self.entropy, self.distance, self.windows, self.top)
        return any(asked) or self.linear is not None or self.targets is not None

    @property
    def wants_keys(self) -> bool:
        """Whether any column statistic is asked for."""
        return any(each.weighs or each.count for each in self.columns)

    @property
    def wants_statistics(self) -> bool:
        """Whether anything beside the output is asked for."""
        return self.wants_rows or self.wants_keys


def _numbers(name: str, given: Any) -> tuple[Any, ...]:
    """Whole numbers, given as a list, an array or the like."""
    try:
        return tuple([index(x) for x in _each(name, given)])
    except TypeError:
        raise ValueError(f"{name} must be whole numbers; got {given!r:.60}") from None


def _each(name: str, given: Any) -> tuple[Any, ...]:
    if not isinstance(given, Iterable):
        raise ValueError(f"{name} must be a tuple; got {given!r:.60}")
    return tuple(given)


@dataclass(eq=False)
class ReducedColumns:
    """``sum`` and ``max`` (batch, head, key), ``count`` (batch, 1 or head, key) int64; None where not asked for."""

    sum: Tensor | None = None
    max: Tensor | None = None
    count: Tensor | None = None


@dataclass(eq=False)
class Reduced:
    """What one attention call computed; fields that were not requested are None.

    ``output`` (batch, head, query, d_value) in the value's dtype. Statistics are float32 (float64 for float64 input):
    rows have shape (batch, head, row), ``linear`` (batch, head, row, n), ``window_mass`` and ``window_distance``
    (batch, head, row, window), ``top_mass`` and ``top_keys`` (int64 positions) (batch, head, row, k), ``target_mass``
    (batch, head, row, t); ``columns`` stand in the order of the request's.
    """

    output: Tensor | None = None
    lse: Tensor | None = None
    max: Tensor | None = None
    entropy: Tensor | None = None
    linear: Tensor | None = None
    distance: Tensor | None = None
    window_mass: Tensor | None = None
    window_distance: Tensor | None = None
    top_mass: Tensor | None = None
    top_keys: Tensor | None = None
    target_mass: Tensor | None = None
    columns: tuple[ReducedColumns, ...] = ()
