"""The plan of one attention call: what the declared statistics ask for, merged into a single request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.statistics.queries import Queries
from headscope.kernels.masks import Mask
from headscope.kernels.request import Columns, Reduced, Request

Planned = tuple[Request, list[tuple[Any, Callable[[Reduced], dict[str, Tensor]]]], Tensor | None]


class Plan:
    """Collects what the declared statistics need from one attention call into a single request."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call
        self._fields: dict[str, Any] = {}
        self._columns: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._windows: list[int] = []
        self._by_key: dict[tuple[int, int] | None, Columns] = {}

    @property
    def key_positions(self) -> Tensor:
        """Position of each key from its example's first token: (batch or 1, key); negative in left padding."""
        return self._positions(self.call.key.shape[2], self.call.mask.key_offset)

    @property
    def query_positions(self) -> Tensor:
        """Position of each query row from its example's first token: (batch or 1, query)."""
        return self._positions(self.call.query.shape[2], self.call.mask.query_offset)

    def _positions(self, count: int, offset: int) -> Tensor:
        device = self.call.query.device
        at = torch.arange(count, device=device)[None] + offset
        start = self.call.mask.start
        return at if start is None else at - start[:, None]

    def flag(self, name: str) -> None:
        """Ask for a reduction of ``Request`` that is on or off."""
        self._fields[name] = True

    def columns(
        self,
        *,
        sum: bool = False,
        max: bool = False,
        count: bool = False,
        queries: tuple[int, int] | None = None,
    ) -> int:
        """Ask for reductions over the rows ``queries`` of the call (None: all; those it has of them); returns their
        place in ``Reduced.columns``. Equal ranges share one."""
        rows = self.call.query.shape[2]
        part = None if queries is None else slice(*queries).indices(rows)[:2]
        part = None if part == (0, rows) else part
        held = self._by_key.get(part, Columns(part))
        wanted = replace(held, sum=held.sum or sum, max=held.max or max, count=held.count or count)
        self._by_key[part] = wanted
        return list(self._by_key).index(part)

    def linear(self, columns: Tensor) -> slice:
        """Ask for sums of p times ``columns`` (batch or 1, key, n); returns their place in ``Reduced.linear``.

        Memberships stay bool: half precision holds them, which a kernel then need not find out from their values.
        """
        first = sum(c.shape[-1] for c in self._columns)
        self._columns.append(columns if columns.dtype == torch.bool else columns.to(torch.float32))
        return slice(first, first + columns.shape[-1])

    def window(self, size: int) -> int:
        """Ask for the window sums of ``size`` tokens; returns their place."""
        if size not in self._windows:
            self._windows.append(size)
        return self._windows.index(size)

    def top(self, k: int) -> slice:
        """Ask for the ``k`` heaviest keys."""
        self._fields["top"] = max(k, self._fields.get("top", 0))
        return slice(0, k)

    def targets(self, positions: Tensor) -> slice:
        """Ask for the mass on key positions (batch or 1, query, t) from each example's start; negative means none."""
        start = self.call.mask.start
        absolute = positions if start is None else positions + start[:, None, None]
        first = sum(t.shape[-1] for t in self._targets)
        self._targets.append(torch.where(positions < 0, -1, absolute))
        return slice(first, first + positions.shape[-1])

    def request(self, rows: Tensor | None) -> Request:
        """The merged request for query rows ``rows`` (None: all)."""
        fields = dict(self._fields)
        if self._columns:
            fields["linear"] = concatenate(self._columns)
        if self._targets:
            fields["targets"] = concatenate(self._targets)
        columns = tuple(self._by_key.values())
        return Request(windows=tuple(self._windows), query_rows=rows, columns=columns, **fields)


class Plans:
    """The plans of one forward pass: layers share their mask object, so that one is made for each mask and shape."""

    def __init__(self, statistics: Sequence[Any], queries: Queries | None, require: Callable[..., None]) -> None:
        self.statistics, self.queries, self._require = statistics, queries, require
        self._made: dict[Any, tuple[Mask, Planned]] = {}

    def of(self, call: AttentionCall, *, prompt: bool, continues: bool) -> Planned:
        """The request for ``call``, how each statistic reads the result, and which query rows (None: all).

        ``continues``: an earlier pass holds the tokens before it; ``require(call, continues=...)`` may refuse the call.
        """
        query = call.query
        shape = (query.shape[2], call.key.shape[2], query.device)
        key = (id(call.mask), *shape, prompt, continues, call.gaps, call.cross)
        if key not in self._made:
            self._require(call, continues=continues)
            rows = None if self.queries is None else self.queries.rows(call, prompt=prompt)
            plan = Plan(call)
            asked = [s for s in self.statistics if s.kind != "output" or prompt]
            readers = [(statistic, statistic.ask(plan)) for statistic in asked]
            self._made[key] = call.mask, (plan.request(rows), readers, rows)  # with the mask, so that its id stays its
        return self._made[key][1]

    def clear(self) -> None:
        """The pass is over."""
        self._made.clear()


def concatenate(parts: list[Tensor]) -> Tensor:
    batch = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=-1)
