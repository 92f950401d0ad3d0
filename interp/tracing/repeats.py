"""Passes in a row that one graph ran: what each left is joined when somebody reads the record."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headscope.interp.statistics import ROW
from headscope.interp.tracing.piece import Piece

Left = tuple[str, Piece]  # of an attention call: its module's pattern, and what it left


class Repeats:
    """Passes of one token each from position ``offset``, over one ``cache``, which leave what a pass had ``left``."""

    def __init__(self, offset: int, left: list[Left], cache: weakref.ref[Any] | None) -> None:
        self.offset, self.left, self.cache = offset, left, cache
        self._values: list[dict[str, Tensor]] = []
        self._ids: list[Tensor] = []

    def follows(self, offset: int, left: list[Left]) -> bool:
        """Whether a pass at position ``offset`` continues these."""
        return left is self.left and offset == self.offset + len(self._values)

    def add(self, values: dict[str, Tensor], ids: Tensor) -> None:
        """One more: its rows (call, batch, head, 1, ...) by name, and its tokens (batch, 1)."""
        self._values.append(values)
        self._ids.append(ids)

    def drop(self) -> None:
        """The last one broke off."""
        self._values.pop()
        self._ids.pop()

    def joined(self) -> tuple[list[Left], Tensor]:
        """What all of them left, as of one pass over their tokens (batch, pass)."""
        count = len(self._values)
        whole = {name: torch.cat([each[name] for each in self._values], 3) for name in self._values[0]}
        pieces: list[Left] = []
        for number, (module, piece) in enumerate(self.left):
            rows = None if piece.rows is None else torch.arange(count)
            values = {ROW: {name: value[number] for name, value in whole.items()}}
            now = replace(piece, shape=(*piece.shape[:2], count), offset=self.offset, start=None, end=None, rows=rows)
            pieces.append((module, replace(now, values=values, parts={}, places={})))
        return pieces, torch.cat(self._ids, 1)
