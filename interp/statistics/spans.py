"""Spans of positions: which keys of a call a span holds.

A span is ``(first, stop)``: token positions counted from the example's first token, ``stop`` excluded. A statistic
takes one pair for all examples, one pair an example, or one list of pairs an example. ``prompts.spans`` finds the spans
of words in a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError

Span = tuple[int, int]
Spans = dict[str, Span]
OPEN = 2**31 - 1  # the stop of a span that has no end yet: a response that is being generated


def members(span: Any, at: Tensor, batch: int) -> Tensor:
    """Which positions ``at`` (batch or 1, key) a span holds: bool (batch or 1, key).

    ``span`` is one pair for all examples, a list with one pair an example, or a list with one list of pairs an example
    (an empty one: the example has no such span). Pairs that overlap count once.

    Raises:
        HeadscopeError: another form, or another number of examples than ``batch``.
    """
    rows = by_example(span)
    if len(rows) not in (1, batch):
        raise HeadscopeError(f"a span was given for {len(rows)} examples, but the batch has {batch}")
    widest = max(1, *(len(row) for row in rows))
    bounds = torch.tensor([[*row, *[(0, 0)] * (widest - len(row))] for row in rows], device=at.device)
    held = torch.zeros_like(at, dtype=torch.bool)
    for first, stop in (pair.unbind(-1) for pair in bounds.unbind(1)):
        held = held | ((at >= first[:, None]) & (at < stop[:, None]))
    return held


def by_example(span: Any) -> list[list[Span]]:
    """Any form of a span as one list of pairs an example; a list of one stands for all examples."""
    held = span.tolist() if hasattr(span, "tolist") else span
    try:
        if not hasattr(held[0], "__len__"):
            held = [held]
        rows = [[row] if len(row) and not hasattr(row[0], "__len__") else list(row) for row in held]
        return [[(int(first), int(stop)) for first, stop in row] for row in rows]
    except (TypeError, ValueError, IndexError) as error:
        raise HeadscopeError(
            f"{str(span)[:60]!r} is no span: give (first, stop), one such pair an example, or one list of pairs an "
            "example"
        ) from error


def intervals(positions: Sequence[int]) -> list[Span]:
    """Ascending positions as the fewest pairs: [3, 4, 5, 9] is [(3, 6), (9, 10)]."""
    found: list[Span] = []
    for at in positions:
        if found and found[-1][1] == at:
            found[-1] = (found[-1][0], at + 1)
        else:
            found.append((at, at + 1))
    return found
