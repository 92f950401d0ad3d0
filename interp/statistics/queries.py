"""Which query rows a tracer records: all (None), the last few, every n-th, or generated ones only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError


def check_count(what: str, value: Any) -> None:
    """Raise HeadscopeError, which begins with ``what``, for anything but a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise HeadscopeError(f"{what} needs a whole number from 1 on")


@dataclass(frozen=True)
class Queries:
    """Base of the selections; a selection names the rows of one attention call."""

    def rows(self, call: AttentionCall, *, prompt: bool) -> Tensor:
        """Row indices (n,), ascending, of this call; ``prompt`` is true for a pass that reads the prompt."""
        raise NotImplementedError


def checked(queries: Any) -> Queries | None:
    """``queries``, or HeadscopeError where it is no selection."""
    if queries is None or isinstance(queries, Queries):
        return queries
    raise HeadscopeError(f"queries={queries!r} selects no rows: give Last(n), Every(n), Generated() or None")


@dataclass(frozen=True)
class Last(Queries):
    """The last ``n`` real queries of every forward pass: for ``n`` = 1, the rows that choose the next token."""

    n: int = 1

    def __post_init__(self) -> None:
        check_count(f"Last({self.n!r})", self.n)

    def rows(self, call: AttentionCall, *, prompt: bool) -> Tensor:
        queries = call.query.shape[2]
        at = torch.arange(queries, device=call.query.device)
        if call.mask.end is None:
            return at[max(0, queries - self.n) :]
        stop = (call.mask.end - call.mask.query_offset).clamp(max=queries)[:, None]
        return at[((at < stop) & (at >= stop - self.n)).any(0)]


@dataclass(frozen=True)
class Every(Queries):
    """Every ``n``-th query, counted from each example's first token."""

    n: int = 16

    def __post_init__(self) -> None:
        check_count(f"Every({self.n!r})", self.n)

    def rows(self, call: AttentionCall, *, prompt: bool) -> Tensor:
        at = torch.arange(call.query.shape[2], device=call.query.device)
        position = at[None] + call.mask.query_offset
        if call.mask.start is not None:
            position = position - call.mask.start[:, None]
        return at[(position % self.n == 0).any(0)]


@dataclass(frozen=True)
class Generated(Queries):
    """Only the rows of the response's tokens: cached decoding, with the prompt at full speed.

    Under ``generate`` the prompt ends where its tokens do, read whole or in chunks. In passes of one's own, a later
    pass of one token is taken for decoding, and one of several for more of the prompt. The step that chooses the
    response's first token is the prompt's last row, and not among these.
    """

    def rows(self, call: AttentionCall, *, prompt: bool) -> Tensor:
        return torch.arange(0 if prompt else call.query.shape[2], device=call.query.device)
