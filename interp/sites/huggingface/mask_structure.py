"""What a dense self-attention mask holds beside its rule: padding around the tokens, and sequences packed in a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 512  # query rows looked at a time


@dataclass(frozen=True, eq=False)
class Structure:
    """``real`` (batch, position): tokens. ``segments`` (batch, position): the sequence of each, None where there is one
    each. ``gaps``: padding stands between tokens."""

    real: Tensor
    segments: Tensor | None
    gaps: bool


def structure_of(visible: Tensor) -> Structure:
    """Padding and packed sequences in ``visible`` (batch, query, key), bool, of a sequence that attends to itself.

    A position that nobody sees, not even itself, is padding; so is one at an end that sees nothing but itself and that
    nobody else sees, as masks leave it that give every row a key. Tokens that are connected by what they see, in either
    direction and over others, are one sequence.
    """
    real, gaps = _tokens(visible)
    labels = _connected(visible, real)
    first = torch.where(real, labels, labels.shape[1]).amin(1, keepdim=True)
    packed = bool((real & (labels != first)).any())
    return Structure(real, labels if packed else None, gaps)


def _tokens(visible: Tensor) -> tuple[Tensor, bool]:
    """Which positions are tokens (batch, position), and whether others stand between them."""
    itself = visible.diagonal(dim1=1, dim2=2)
    alone = itself.long()
    lonely = (visible.sum(2) == alone) & (visible.sum(1) == alone)
    empty = (visible.sum(1) == 0) & ~itself
    busy = ~lonely & ~empty
    inner = (busy.cumsum(1) > 0) & (busy.flip(1).cumsum(1).flip(1) > 0)
    padding = empty | (lonely & ~inner & busy.any(1, keepdim=True))
    real = ~padding | padding.all(1, keepdim=True)
    between = (real.cumsum(1) > 0) & (real.flip(1).cumsum(1).flip(1) > 0) & ~real
    return real, bool(between.any())


def _connected(visible: Tensor, real: Tensor) -> Tensor:
    """The first position of each token's sequence (batch, position): labels travel along what is seen until they
    rest, and jump to their label's label, so that a window's chain takes the logarithm of its length."""
    positions = visible.shape[1]
    labels = torch.arange(positions, device=visible.device).expand(visible.shape[0], -1).clone()
    while True:
        before = labels.clone()
        for first in range(0, positions, ROWS):
            rows = slice(first, min(positions, first + ROWS))
            seen = visible[:, rows] & real[:, rows, None]  # (batch, row, key)
            lowest = torch.where(seen, labels[:, None], labels[:, rows, None]).amin(2)
            labels[:, rows] = torch.minimum(labels[:, rows], lowest)
            reached = torch.where(seen, labels[:, rows, None], positions).amin(1)
            labels = torch.minimum(labels, reached)
        labels = labels.gather(1, labels)
        if torch.equal(labels, before):
            return labels
