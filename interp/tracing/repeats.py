"""Passes in a row that one graph ran: what they left is joined when somebody reads the record."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headscope.interp.statistics import ROW
from headscope.interp.tracing.piece import Piece
from headscope.interp.tracing.session import Session


class Repeats:
    """Passes of one token each from position ``offset``, over one ``cache``: each leaves what ``pieces`` are of."""

    def __init__(self, offset: int, pieces: list[Piece], cache: weakref.ref[Any] | None) -> None:
        self.offset, self.pieces, self.cache = offset, pieces, cache
        self._values: list[dict[str, Tensor]] = []
        self._ids: list[Tensor] = []

    def follows(self, offset: int, pieces: list[Piece]) -> bool:
        """Whether a pass at position ``offset`` continues these."""
        return pieces is self.pieces and offset == self.offset + len(self._values)

    def add(self, values: dict[str, Tensor], ids: Tensor) -> None:
        """One more: its rows (call, batch, head, 1, ...) by name, and its tokens (batch, 1)."""
        self._values.append(values)
        self._ids.append(ids)

    def drop(self) -> None:
        """The last one broke off."""
        self._values.pop()
        self._ids.pop()

    def leave(self, session: Session) -> None:
        """Give a session what all of them left, as one pass over their tokens."""
        if not self._values:
            return
        count = len(self._values)
        whole = {name: torch.cat([each[name] for each in self._values], 3) for name in self._values[0]}
        where = self.pieces[0].where
        rows = None if where.rows is None else torch.arange(count)
        # every example goes on: a step's graph is of tokens that follow those before them
        where = replace(where, shape=(*where.shape[:2], count), offset=self.offset, start=None, end=None, rows=rows)
        session.check(session.module, self.offset, self.cache)
        session.add_tokens(self.offset, torch.cat(self._ids, 1))
        values = [{name: value[number] for name, value in whole.items()} for number in range(len(self.pieces))]
        session.add([Piece(p.layer, where, {ROW: rows}) for p, rows in zip(self.pieces, values, strict=True)])
