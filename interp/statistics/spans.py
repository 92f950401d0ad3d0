"""Spans of positions: which keys of a call a span holds.

A span is ``(first, stop)``: token positions counted from the example's first token, ``stop`` excluded. A statistic
takes one pair for all examples, one pair an example, one list of pairs an example, or a name: whoever builds a prompt
publishes its spans by name (``with published_spans({"needle": (40, 52)})``: the tasks do), and a name means those of
the prompt that is being read. ``prompts.spans`` finds the spans of words in a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError

Span = tuple[int, int]
Spans = dict[str, Span]
OPEN = 2**31 - 1  # the stop of a span that has no end yet: a response that is being generated
_PUBLISHED: ContextVar[Mapping[str, Any]] = ContextVar("headscope_spans", default={})  # noqa: B039 (never changed)


@contextmanager
def published_spans(spans: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block statistics and edits may name these spans (``span="needle"``); a block inside it adds to them.

    Raises:
        HeadscopeError: something that is no span.
    """
    for span in spans.values():
        by_example(span)
    token = _PUBLISHED.set({**_PUBLISHED.get(), **spans})
    try:
        yield
    finally:
        _PUBLISHED.reset(token)


@contextmanager
def spans_of_example(index: int, count: int) -> Iterator[None]:
    """Inside the block the published spans of ``count`` examples are those of one of them, which is read by itself."""
    each = {name: by_example(span) for name, span in _PUBLISHED.get().items()}
    with published_spans({name: [rows[index]] for name, rows in each.items() if len(rows) == count}):
        yield


def named(span: Any) -> Any:
    """``span``, or where it is a name the span that is published under it.

    Raises:
        HeadscopeError: nothing is published under that name.
    """
    if not isinstance(span, str):
        return span
    known = _PUBLISHED.get()
    if span not in known:
        there = f"this prompt has {', '.join(known)}" if known else "this prompt publishes none"
        raise HeadscopeError(f"no span is called {span!r}: {there}; give positions, or publish it with published_spans")
    return known[span]


def numbered(name: str) -> list[Any]:
    """The spans that are published as ``name_0``, ``name_1`` and so on.

    Raises:
        HeadscopeError: there is no ``name_0``.
    """
    known = _PUBLISHED.get()
    found: list[Any] = []
    while (one := f"{name}_{len(found)}") in known:
        found.append(known[one])
    return found or [named(f"{name}_0")]


def members(span: Any, at: Tensor, batch: int) -> Tensor:
    """Which positions ``at`` (batch or 1, key) a span holds: bool (batch or 1, key).

    ``span`` is one pair for all examples, a list with one pair an example, a list with one list of pairs an example
    (an empty one: the example has no such span), or the name of a published one. Pairs that overlap count once.

    Raises:
        HeadscopeError: another form, another number of examples than ``batch``, or a name that is not published.
    """
    rows = by_example(span)
    if len(rows) not in (1, batch):
        raise HeadscopeError(f"a span was given for {len(rows)} examples, but the batch has {batch}")
    held = torch.zeros_like(at, dtype=torch.bool)
    if len(rows) == 1:  # nothing is brought from the host, which a card would wait for in every step
        for pair in rows[0]:
            held = held | ((at >= pair[0]) & (at < pair[1]))
        return held
    widest = max(1, *(len(row) for row in rows))
    bounds = torch.tensor([[*row, *[(0, 0)] * (widest - len(row))] for row in rows], device=at.device)
    for first, stop in (pair.unbind(-1) for pair in bounds.unbind(1)):
        held = held | ((at >= first[:, None]) & (at < stop[:, None]))
    return held


def by_example(span: Any) -> list[list[Span]]:
    """Any form of a span as one list of pairs an example; a list of one stands for all examples."""
    span = named(span)
    held = span.tolist() if hasattr(span, "tolist") else span
    try:
        if not hasattr(held[0], "__len__"):
            held = [held]
        rows = [[row] if len(row) and not hasattr(row[0], "__len__") else list(row) for row in held]
        return [[_pair(first, stop) for first, stop in row] for row in rows]
    except (TypeError, ValueError, IndexError) as error:
        raise HeadscopeError(
            f"{str(span)[:60]!r} is no span: give (first, stop), one such pair an example, or one list of pairs an "
            "example; positions are whole numbers that count from the example's first token, first up to stop"
        ) from error


def _pair(first: Any, stop: Any) -> Span:
    whole = int(first), int(stop)
    if whole != (first, stop) or not 0 <= whole[0] <= whole[1]:
        raise ValueError(f"({first}, {stop})")
    return whole


def intervals(positions: Sequence[int]) -> list[Span]:
    """Ascending positions as the fewest pairs: [3, 4, 5, 9] is [(3, 6), (9, 10)]."""
    found: list[Span] = []
    for at in positions:
        if found and found[-1][1] == at:
            found[-1] = (found[-1][0], at + 1)
        else:
            found.append((at, at + 1))
    return found
