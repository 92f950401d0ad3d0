"""Sequences of which some tokens tell the next token apart and others do not.

Tian et al. 2023 (arXiv 2305.16380), as in the authors' code (facebookresearch/luckmatters @ 400c7ca,
``ssl/real-dataset/decoder_only.py``, ``Dataset2``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Classes n of sequences, one a next token: a last token m (the query), and tokens before it from P(l | m, n).

    Token ids: ``common`` tokens, then ``distinct`` of each class, then last tokens, then next tokens.

    Args:
        last: last tokens.
        following: next tokens of each last token: ``last * following`` classes.
        common: tokens that every class draws with weight 1.
        distinct: tokens that one class alone draws, with weights from ``lowest`` to ``highest`` in even steps.
        lowest, highest: those weights.
        length: tokens of a sequence, the last among them.
    """

    last: int = 3
    following: int = 2
    common: int = 10
    distinct: int = 10
    lowest: float = 0.1
    highest: float = 1.0
    length: int = 128

    @property
    def classes(self) -> int:
        return self.last * self.following

    @property
    def vocabulary(self) -> int:
        return self.common + self.classes * self.distinct + self.last + self.classes

    @property
    def queries(self) -> Tensor:
        """The last token of each class, (class,)."""
        first = self.common + self.classes * self.distinct
        return first + torch.arange(self.classes) // self.following

    @property
    def answers(self) -> Tensor:
        """The next token of each class, (class,)."""
        return self.vocabulary - self.classes + torch.arange(self.classes)

    @property
    def own(self) -> Tensor:
        """The distinct tokens of each class, from the rarest to the most frequent: (class, distinct)."""
        return self.common + torch.arange(self.classes * self.distinct).view(self.classes, self.distinct)

    def probabilities(self) -> Tensor:
        """P(l | m, n) of every token: (class, vocabulary)."""
        weights = torch.zeros(self.classes, self.vocabulary)
        weights[:, : self.common] = 1.0
        rising = torch.linspace(self.lowest, self.highest, self.distinct)
        weights.scatter_(1, self.own, rising.expand(self.classes, -1))
        return weights / weights.sum(1, keepdim=True)

    def batch(self, size: int, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens before the last (size, length - 1), last tokens (size,) and next tokens (size,)."""
        which = torch.randint(self.classes, (size,), generator=source)
        drawn = torch.multinomial(self.probabilities()[which], self.length - 1, replacement=True, generator=source)
        return drawn, self.queries[which], self.answers[which]
