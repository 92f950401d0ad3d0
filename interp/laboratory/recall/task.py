"""Pairs to recall: a token holds a key and its value, a later token asks for a key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import check_counts


@dataclass(frozen=True)
class Recall:
    """``pairs`` of different keys among ``blanks``, in any order, then ``queries`` that ask for keys of the pairs.

    Tokens: 0 is a blank, 1 .. keys * values are pairs (key * values + value + 1), and keys more are the questions.
    What is asked for is not written anywhere else, so that attention of any direction may read the text.

    Raises:
        HeadscopeError: more pairs than keys.
    """

    keys: int = 16
    values: int = 8
    pairs: int = 16
    blanks: int = 8
    queries: int = 8

    def __post_init__(self) -> None:
        check_counts(1, keys=self.keys, values=self.values, pairs=self.pairs, queries=self.queries)
        if self.pairs > self.keys:
            raise HeadscopeError(f"{self.pairs} pairs need as many keys, not {self.keys}")

    @property
    def vocabulary(self) -> int:
        """How many tokens there are; values are answered as tokens 0 .. values - 1."""
        return 1 + self.keys * self.values + self.keys

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return self.pairs + self.blanks + self.queries

    def draw(self, count: int, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (count, length), and of every question the value (count, queries) and the position of its pair."""
        keys = torch.rand(count, self.keys, generator=source).argsort(-1)[:, : self.pairs]
        values = torch.randint(self.values, keys.shape, generator=source)
        at = torch.rand(count, self.pairs + self.blanks, generator=source).argsort(-1)[:, : self.pairs]
        asked = torch.randint(self.pairs, (count, self.queries), generator=source)
        text = torch.zeros(count, self.pairs + self.blanks, dtype=torch.long)
        text.scatter_(1, at, 1 + keys * self.values + values)
        questions = 1 + self.keys * self.values + keys.gather(1, asked)
        return torch.cat([text, questions], 1), values.gather(1, asked), at.gather(1, asked)
