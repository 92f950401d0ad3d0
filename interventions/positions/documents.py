"""Documents of a prompt: spans that follow one another, by column, for the edits that read them side by side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.spans import Span, by_example, numbered
from headscope.interventions.phases import require_told


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of every example of a call: ``first`` and ``stop`` (batch, document), columns of the batch.

    An example with fewer documents than another has empty ones at its end. ``begin`` and ``end`` (batch,) are the
    columns of all of them.
    """

    first: Tensor
    stop: Tensor
    call: AttentionCall

    @classmethod
    def of(cls, given: Any, call: AttentionCall, what: str) -> Documents:
        """Those that a setting names (see ``listed``), in the prompt of ``call``.

        Raises:
            HeadscopeError: no such spans, another number of examples, or positions that cannot be told.
        """
        require_told(call, what)
        rows, batch, device = listed(given, what), call.query.shape[0], call.query.device
        if len(rows) not in (1, batch):
            raise HeadscopeError(f"{what} were given for {len(rows)} examples, but the batch has {batch}")
        most = max(1, *(len(row) for row in rows))
        ends = [row[-1][1] if row else 0 for row in rows]
        filled = [[*row, *[(end, end)] * (most - len(row))] for row, end in zip(rows, ends, strict=True)]
        bounds = torch.tensor(filled, device=device).expand(batch, -1, -1)
        start = call.mask.start
        bounds = bounds if start is None else bounds + start[:, None, None]
        return cls(bounds[..., 0], bounds[..., 1], call)

    @property
    def begin(self) -> Tensor:
        return self.first[:, 0]

    @property
    def end(self) -> Tensor:
        return self.stop[:, -1]

    @property
    def length(self) -> Tensor:
        """Tokens of each: (batch, document)."""
        return self.stop - self.first

    @cached_property
    def columns(self) -> tuple[int, int]:
        """The first and the last column, with the one after, of any document of any example."""
        return int(self.begin.min()), int(self.end.max())

    @cached_property
    def of_rows(self) -> Tensor:
        """Which document each query is of, (batch, query); -1: none."""
        return self._of(self.call.query.shape[2], self.call.mask.query_offset)

    @cached_property
    def of_keys(self) -> Tensor:
        """Which document each key is of, (batch, key); -1: none."""
        return self._of(self.call.key.shape[2], self.call.mask.key_offset)

    def _of(self, count: int, offset: int) -> Tensor:
        at = torch.arange(count, device=self.first.device)[None, None] + offset
        held = (at >= self.first[..., None]) & (at < self.stop[..., None])
        number = torch.arange(self.first.shape[1], device=self.first.device)[None, :, None]
        return torch.where(held, number, -1).amax(1)

    @property
    def reached(self) -> bool:
        """Whether the pass has a row of a document, or after one."""
        mask = self.call.mask
        return self.columns[0] < mask.query_offset + self.call.query.shape[2] and bool((self.end > self.begin).any())

    def require_whole(self, what: str) -> None:
        """Refuse a pass that holds a part of an example's documents alone, for ``what`` they see one another.

        Raises:
            HeadscopeError: says to read them at once.
        """
        first = self.call.mask.query_offset
        stop = first + self.call.query.shape[2]
        touched = (self.begin < stop) & (self.end > first) & (self.end > self.begin)
        if bool((touched & ((self.begin < first) | (self.end > stop))).any()):
            raise HeadscopeError(
                f"{what} has all documents of a prompt see one another, so they must be read in one pass, and this one "
                "holds a part of them: read the prompt whole, or cut it before or after the documents"
            )


def listed(given: Any, what: str) -> list[list[Span]]:
    """Documents as one list of spans an example; a list of one stands for all examples.

    ``given`` is a list of (first, stop), a list with one such list an example, or a name: ``"document"`` means the
    published spans ``document_0``, ``document_1`` and so on.

    Raises:
        HeadscopeError: another form, spans that do not follow one another, or an empty one.
    """
    if isinstance(given, str):
        each = [by_example(span) for span in numbered(given)]
        batch = max(len(rows) for rows in each)
        rows = [[span for rows in each for span in rows[i if len(rows) > 1 else 0]] for i in range(batch)]
    else:
        flat = bool(len(given)) and all(len(one) == 2 and not hasattr(one[0], "__len__") for one in given)
        rows = by_example([list(given)] if flat else given)
    for row in rows:
        for one, after in zip(row, row[1:], strict=False):
            if one[1] != after[0]:
                raise HeadscopeError(
                    f"{what} {one} and {after} do not follow one another: name them in their order, and put what "
                    "stands between two of them into one"
                )
        if any(first == stop for first, stop in row):
            raise HeadscopeError(f"{what} must hold a token each, and one of {row} is empty")
    return rows
