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
        self._left: list[tuple[int, dict[str, Tensor], Tensor | None]] = []

    def follows(self, offset: int, pieces: list[Piece]) -> bool:
        """Whether a pass at position ``offset`` continues these."""
        return pieces is self.pieces and offset == self.offset + len(self._left)

    def add(self, number: int, values: dict[str, Tensor], ids: Tensor | None) -> None:
        """One more, after ``number`` passes: its rows (call, batch, head, 1, ...) by name, its tokens (batch, 1)."""
        self._left.append((number, values, ids))

    def drop(self, number: int) -> None:
        """The pass after ``number`` passes broke off, if it is among these."""
        if self._left and self._left[-1][0] == number:
            self._left.pop()

    def leave(self, session: Session) -> None:
        """Give a session what all of them left, as one pass over their tokens."""
        if not self._left:
            return
        count, (_, values, ids) = len(self._left), zip(*self._left, strict=True)
        whole = {name: torch.cat([each[name] for each in values], 3) for name in values[0]}
        where = self.pieces[0].where
        rows = None if where.rows is None else torch.arange(count)
        # every example goes on: a step's graph is of tokens that follow those before them
        where = replace(where, shape=(*where.shape[:2], count), offset=self.offset, start=None, end=None, rows=rows)
        session.check(session.module, self.offset, self.cache)
        tokens = [each for each in ids if each is not None]
        if len(tokens) == count:
            session.add_tokens(self.offset, torch.cat(tokens, 1))
        rows_of = [{name: value[number] for name, value in whole.items()} for number in range(len(self.pieces))]
        session.add([Piece(p.layer, where, {ROW: rows}) for p, rows in zip(self.pieces, rows_of, strict=True)])
