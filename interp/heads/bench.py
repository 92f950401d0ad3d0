"""Trials of head methods in another process, beside its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headscope.interp.heads.base import HeadMethod, Measured, Scored
from headscope.interp.heads.passes import Batch, run
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.journal import Trial


@dataclass(frozen=True, eq=False)
class Piece:
    """What is run at once: a ``batch`` that measured ``methods`` (by their numbers) share, or the ``trial`` with the
    ``number`` that one method scores."""

    methods: tuple[int, ...]
    trial: Trial | None = None
    number: int = 0
    batch: Batch | None = None


class Bench:
    """A model, and the methods that are tried on it."""

    def __init__(self, make: Callable[[], LanguageModel], methods: Sequence[HeadMethod]) -> None:
        self.lm, self.methods = make(), list(methods)

    def run(self, piece: Piece) -> list[list[Scored]]:
        """Scores of every trial of the piece, by its methods."""
        mine = [self.methods[number] for number in piece.methods]
        if piece.batch is None:
            assert piece.trial is not None
            return [[mine[0].score(self.lm, piece.trial)]]
        batch = replace(piece.batch, methods=tuple(one for one in mine if isinstance(one, Measured)))
        return [list(found) for _, found in run(self.lm, batch)]
