"""Sequences of items and their labels, and questions in which two items are the same and only one label is right.

Wu et al. 2025 (arXiv 2502.01951), after Reddy 2024; the numbers are those of the authors' code
(xinyiwu98/position-bias-in-attention @ 3967a93, ``data.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError

PLACES = ("first", "middle", "last")
PAIRS_OF_PLACES = (("first", "middle"), ("first", "last"), ("middle", "last"))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a sequence is made of: x1, l1, ..., xN, lN, xq, where xq is of the class of the answer's item.

    Args:
        pairs: items with a label before the query (N).
        copies: how often each class stands among them (B): ``pairs / copies`` classes.
        width: of every vector (D).
        noise: an item is (mu + noise eta) / sqrt(1 + noise^2), with eta drawn anew (eps).
    """

    pairs: int = 8
    copies: int = 4
    width: int = 64
    noise: float = 0.75

    def __post_init__(self) -> None:
        if self.copies < 1 or self.pairs % self.copies:
            raise HeadscopeError(f"{self.pairs} pairs are no {self.copies} copies of some classes: give a divisor")

    @property
    def length(self) -> int:
        """Vectors of a sequence, the query among them."""
        return 2 * self.pairs + 1

    def place(self, name: str) -> int:
        """The pair that is ``"first"``, ``"middle"`` (N / 2) or ``"last"``."""
        return {"first": 0, "middle": self.pairs // 2, "last": self.pairs - 1}[name]


@dataclass(frozen=True, eq=False)
class World:
    """Classes and labels that stay: ``means`` (class, width), ``labels`` (class,), ``contents`` (label, width).

    Every coordinate has standard deviation 1 / width, as in the authors' code (Reddy's have 1 / sqrt(width)).
    """

    means: Tensor
    labels: Tensor
    contents: Tensor

    @classmethod
    def draw(cls, classes: int, labels: int, width: int, source: torch.Generator) -> World:
        """A world of random vectors; each class has one of the labels, by chance."""
        means, contents = (_vectors((n,), width, source) for n in (classes, labels))
        return cls(means, torch.randint(labels, (classes,), generator=source), contents)

    def batch(
        self, shape: Shape, size: int, source: torch.Generator, answers: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sequences (size, length, width) and the label that is right (size,).

        ``answers``: the pairs among which the answer is drawn (all of them by default).
        """
        which = _distinct(len(self.means), shape.pairs // shape.copies, size, source)
        among = torch.tensor(range(shape.pairs) if answers is None else list(answers))
        answer = among[torch.randint(len(among), (size,), generator=source)]
        which = _shuffled(which, shape, source)
        return self._written(self.means[which], self.labels[which], answer, shape, source)

    def question(
        self, shape: Shape, right: int, other: int, size: int, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """``IC_right_other``: classes never seen, the answer's item stands at pair ``right``, and its very vector at
        ``other`` too, whose label stays what it was. Only the position says which label is right.

        The authors draw 2,048 new classes a sequence and take two; here two are drawn. As there, both may have the
        same label by chance, and the item overwritten may be of the answer's class.
        """
        kinds = shape.pairs // shape.copies
        means = _vectors((size, kinds), shape.width, source)
        labels = torch.randint(len(self.contents), (size, kinds), generator=source)
        which = _shuffled(torch.arange(kinds).expand(size, -1), shape, source)
        chosen = means.gather(1, which[..., None].expand(-1, -1, shape.width))
        at = torch.full((size,), right)
        rows, label = self._written(chosen, labels.gather(1, which), at, shape, source)
        rows[:, 2 * other] = rows[:, 2 * right]
        return rows, label

    def _written(
        self, means: Tensor, labels: Tensor, answer: Tensor, shape: Shape, source: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Pairs of ``means`` (size, pair, width) and ``labels`` (size, pair), and a query like the item ``answer``."""
        size = len(means)
        one = torch.arange(size)
        items = torch.cat([means, means[one, answer][:, None]], 1)
        noise = _vectors((size, shape.pairs + 1), shape.width, source)
        items = (items + shape.noise * noise) / (1 + shape.noise**2) ** 0.5
        rows = means.new_empty(size, shape.length, shape.width)
        rows[:, 0::2], rows[:, 1::2] = items, self.contents[labels]
        return rows, labels[one, answer]


def _vectors(shape: tuple[int, ...], width: int, source: torch.Generator) -> Tensor:
    return torch.randn(*shape, width, generator=source) / width


def _distinct(total: int, count: int, size: int, source: torch.Generator) -> Tensor:
    """``count`` different numbers below ``total`` a row, every set as likely (Floyd's algorithm): (size, count)."""
    chosen = torch.empty(size, 0, dtype=torch.long)
    for top in range(total - count, total):
        drawn = torch.randint(top + 1, (size, 1), generator=source)
        taken = (chosen == drawn).any(1, keepdim=True)
        chosen = torch.cat([chosen, torch.where(taken, top, drawn)], 1)
    return chosen


def _shuffled(which: Tensor, shape: Shape, source: torch.Generator) -> Tensor:
    """``copies`` of each of a row's classes, in random order: (size, pair)."""
    order = torch.rand(len(which), shape.pairs, generator=source).argsort(1)
    return which.repeat(1, shape.copies).gather(1, order)
