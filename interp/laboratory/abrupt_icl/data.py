"""Sequences of items and labels, whose last item's label is asked for (Reddy 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from headscope.interp.errors import HeadscopeError
from headscope.interp.laboratory.training import generator

NOVEL = 128  # classes that are made anew at every draw


@dataclass(frozen=True)
class Batch:
    """Sequences, example first: ``tokens`` (example, 2 pairs + 1, positions + dimensions) hold an item in row 2n, its
    label in row 2n + 1 and the target in the last row; ``label`` (example,), what the target's class is called;
    ``context`` (example, pairs), the labels shown; ``same`` (example, pairs): the pair's item is of the target's class.
    """

    tokens: Tensor
    label: Tensor
    context: Tensor
    same: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """On another device."""
        return Batch(*(x.to(device) for x in (self.tokens, self.label, self.context, self.same)))


@dataclass(frozen=True, kw_only=True)
class Law:
    """How sequences are drawn.

    ``classes`` K are named by ``labels`` L in turn (class k has label k mod L), ``noise`` is the spread of items about
    their class (eps), ``skew`` the exponent of P(k) ~ (k + 1)^-skew. A sequence has ``pairs`` N of item and label. A
    share ``bursty`` of them shows pairs / ``burst`` classes of different labels, ``burst`` times each, the target's
    among them; the rest draws every item and the target from P alone. ``burst`` 0: none is bursty. A share ``novel``
    shows classes that were never seen, bursty ones always. ``positions`` one-hot places, of which a sequence takes
    2 pairs + 1 in a row from a random start; ``dimensions`` of an item or label.

    With different labels in a sequence (the authors' ``no_repeats``, which their script sets), bursty sequences choose
    labels and classes evenly: ``skew`` acts on the others alone, as in their code.

    Raises:
        HeadscopeError: numbers that do not go together.
    """

    classes: int = 256
    labels: int = 32
    pairs: int = 8
    burst: int = 4
    noise: float = 0.1
    skew: float = 0.0
    bursty: float = 1.0
    novel: float = 0.0
    positions: int = 65
    dimensions: int = 63

    def __post_init__(self) -> None:
        if self.classes % self.labels or NOVEL % self.labels:
            raise HeadscopeError(
                f"{self.labels} labels do not name {self.classes} classes (and {NOVEL} novel ones) evenly"
            )
        if self.burst and (self.pairs % self.burst or self.burst >= self.pairs):
            raise HeadscopeError(f"burst {self.burst} has to divide {self.pairs} pairs, and be smaller")
        if self.pairs // self.copies > self.labels or 2 * self.pairs + 1 > self.positions:
            raise HeadscopeError(f"{self.pairs} pairs do not fit {self.positions} positions and {self.labels} labels")

    @property
    def copies(self) -> int:
        """Of each class in a bursty sequence; half the pairs where ``burst`` is 0 (the authors' choice)."""
        return self.burst or self.pairs // 2

    def only_novel(self) -> Law:
        """Novel classes only: nothing but the context tells a label (the paper's IC test)."""
        return replace(self, bursty=1.0, novel=1.0)

    def only_known(self) -> Law:
        """Known classes, drawn without the target (IW): the context seldom helps."""
        return replace(self, burst=0, bursty=0.0, novel=0.0)


class World:
    """The classes and labels of one seed, (class or label, dimension): normal, of length 1 on average."""

    def __init__(self, law: Law, seed: int, device: torch.device | str = "cpu") -> None:
        source = generator(seed, -1, device)
        self.labels = _normal((law.labels, law.dimensions), source)
        self.classes = _normal((law.classes, law.dimensions), source)

    def draw(self, law: Law, count: int, source: Generator, *, flipped: bool = False) -> Batch:
        """``count`` sequences. ``flipped``: pairs show the next label of the list instead of their own, and ``label``
        is that of the target's context (the paper's IC2 test); novel classes are never flipped."""
        device = source.device
        shown, target = _bursty(law, law.classes, count, source)
        lone = torch.rand(count, device=device, generator=source) >= (law.bursty if law.burst else 0.0)
        weight = torch.arange(1, law.classes + 1, device=device).double() ** -law.skew
        drawn = torch.multinomial(weight, count * (law.pairs + 1), replacement=True, generator=source).view(count, -1)
        shown = torch.where(lone[:, None], drawn[:, 1:], shown)
        target = torch.where(lone, drawn[:, 0], target)
        fresh, wanted = _bursty(law, NOVEL, count, source)
        new = torch.rand(count, device=device, generator=source) < law.novel
        shown = torch.where(new[:, None], fresh + law.classes, shown)  # novel classes stand behind the known
        target = torch.where(new, wanted + law.classes, target)
        centres = torch.cat([self.classes, _normal((NOVEL, law.dimensions), source)])
        name = torch.arange(law.classes + NOVEL, device=device) % law.labels  # K is a multiple of L
        if flipped:
            name[: law.classes] = (name[: law.classes] + 1) % law.labels
        items = centres[torch.cat([shown, target[:, None]], 1)]
        items = (items + law.noise * _normal(items.shape, source)) / (1 + law.noise**2) ** 0.5
        tokens = self._tokens(law, items, name[shown], source)
        return Batch(tokens, name[target], name[shown], shown == target[:, None])

    def _tokens(self, law: Law, items: Tensor, context: Tensor, source: Generator) -> Tensor:
        """``items`` (example, pairs + 1, dimension) and labels in turn, behind their one-hot places."""
        count, rows = len(items), 2 * law.pairs + 1
        content = items.new_empty(count, rows, law.dimensions)
        content[:, 0::2], content[:, 1::2] = items, self.labels[context]
        start = torch.randint(law.positions - rows + 1, (count, 1), device=items.device, generator=source)
        place: Tensor = one_hot(start + torch.arange(rows, device=items.device), law.positions)
        return torch.cat([place.to(content), content], -1)


def _normal(shape: tuple[int, ...], source: Generator) -> Tensor:
    drawn = torch.randn(shape, device=source.device, generator=source)
    return drawn / math.sqrt(shape[-1])


def _bursty(law: Law, classes: int, count: int, source: Generator) -> tuple[Tensor, Tensor]:
    """Classes of different labels, ``copies`` each in random order, and one of them: (count, pairs) and (count,)."""

    def order(size: int) -> Tensor:
        return torch.rand(count, size, device=source.device, generator=source).argsort(-1)

    kinds = law.pairs // law.copies
    label = order(law.labels)[:, :kinds]
    again = torch.randint(classes // law.labels, (count, kinds), device=source.device, generator=source)
    shown = (again * law.labels + label).repeat(1, law.copies).gather(1, order(kinds * law.copies))
    one = torch.randint(shown.shape[1], (count, 1), device=source.device, generator=source)
    return shown, shown.gather(1, one)[:, 0]
