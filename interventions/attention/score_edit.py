"""Bases of the edits of scores before softmax, of whichever keys or of a span's.

A change that says the same number for every row is a key bias, which every engine takes. Any other is a ``ScoreEdit``:
declared, which GPU kernels evaluate, where a share of each score or an offset says it (``add``), else a function
(``only``), evaluated tile by tile. None holds a query x key tensor.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.spans import by_example
from headscope.interventions.attention.pattern_edit import PatternEdit
from headscope.interventions.phases import is_every
from headscope.kernels.edit_terms import Of, Term
from headscope.kernels.score_edits import ScoreEdit, ScoreFunction


@dataclass(frozen=True, eq=False)
class ScoresEdit(PatternEdit):
    """Base of the edits of scores: a subclass writes ``change`` with ``add``, ``add_to_keys`` or ``only``, says in
    ``neutral`` which settings change nothing, and tells ``note`` whether a call had anything to act on."""

    def add(
        self,
        call: AttentionCall,
        mine: Tensor,
        of: Of = "one",
        *,
        rows: Tensor | float = 1.0,
        keys: Tensor | None = None,
        **more: Any,
    ) -> AttentionCall:
        """``call`` with w g(s) added to each score s of rows ``mine`` (batch or 1, head, query), as ``Term`` has it.

        w is ``rows``, a number or (batch or 1, head or 1, query), times ``keys`` (batch or 1, head or 1, key), bool or
        numbers, and what ``more`` fields of a ``Term`` say.
        """
        return call.with_score_edit(ScoreEdit.of(weight(call, mine, of, rows=rows, keys=keys, **more)))

    def only(self, call: AttentionCall, mine: Tensor, function: ScoreFunction) -> AttentionCall:
        """``call`` with the scores of rows ``mine`` (batch or 1, head, query) changed by ``function``."""
        first_row = call.mask.query_offset

        def changed(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            on = mine[b if mine.shape[0] > 1 else 0, h, q - first_row]
            return torch.where(on, function(s, b, h, q, k), s)

        return call.with_score_edit(ScoreEdit(changed))

    def add_to_keys(self, call: AttentionCall, mine: Tensor, bias: Tensor) -> AttentionCall:
        """``call`` with ``bias`` (batch or 1, key), finite or -inf, added to each key's score in rows ``mine``."""
        if not is_every(self.rows(call), call) or call.score_edit is not None:  # a key bias acts before that edit
            return self.add(call, mine, keys=bias[:, None])
        heads = self._heads(call)
        every = self.heads is None
        return call.with_key_bias(bias[:, None] if every else torch.where(heads[:, None], bias[:, None], 0.0))


@dataclass(frozen=True, eq=False)
class SpanEdit(ScoresEdit):
    """Base of the edits of the scores of a span's keys.

    Args:
        span: the keys, as statistics take spans: (first, stop) from the example's first token, one pair an example, one
            list of pairs an example, or the name of a published span (``"image"``, ``"needle"``).
    """

    _: KW_ONLY
    span: Any

    nothing: ClassVar[str] = "no row that was meant sees a key of its span"

    def __post_init__(self) -> None:
        if not isinstance(self.span, str):
            by_example(self.span)
        super().__post_init__()

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """``change_keys`` of the span's keys."""
        keys = self.keys(call, self.span, "the span's keys")
        self.note(self.meets(call, mine, keys))
        return self.change_keys(call, mine, keys)

    def change_keys(self, call: AttentionCall, mine: Tensor, keys: Tensor) -> AttentionCall:
        """What the layer computes with instead; ``mine`` as in ``change``, ``keys`` bool (batch or 1, key)."""
        raise NotImplementedError

    def meets(self, call: AttentionCall, mine: Tensor, keys: Tensor) -> Tensor:
        """Whether rows ``mine`` may see some of ``keys``, by position alone: bool (batch or 1,)."""
        at = torch.arange(mine.shape[2], device=mine.device)
        real = None if call.cross else call.mask.query_is_real(at)
        row = mine.any(1) if real is None else mine.any(1) & real
        query = at + call.mask.query_offset
        key = torch.arange(keys.shape[1], device=keys.device) + call.mask.key_offset
        near = row.any(-1) & keys.any(-1)
        if call.mask.right is not None:  # the last such row, and the first such key
            last = torch.where(row, query, query[0]).amax(-1)
            near = near & (torch.where(keys, key, key[-1]).amin(-1) <= last + call.mask.right)
        if call.mask.left is not None:
            first = torch.where(row, query, query[-1]).amin(-1)
            near = near & (torch.where(keys, key, key[0]).amax(-1) >= first - call.mask.left)
        return near


def weight(
    call: AttentionCall,
    mine: Tensor,
    of: Of = "one",
    *,
    rows: Tensor | float = 1.0,
    keys: Tensor | None = None,
    **more: Any,
) -> Term:
    """The term that ``ScoresEdit.add`` adds."""
    if keys is not None:
        keys = call.either(keys, 1.0, 0.0) if keys.dtype == torch.bool else keys
    first_query, first_key = call.mask.query_offset, call.mask.key_offset
    queries = call.either(mine, rows, 0.0)
    return Term(of=of, queries=queries, keys=keys, first_query=first_query, first_key=first_key, **more)


def number(kind: str, name: str, value: Any, *, above: float = -math.inf) -> None:
    """Refuse what is no finite number above ``above``.

    Raises:
        HeadscopeError: names the setting.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > above
    if not good:
        bound = "" if above == -math.inf else f" above {above:g}"
        raise HeadscopeError(f"{kind}: {name} must be a finite number{bound}, not {value!r}")
