"""Selected contexts: each row keeps the contexts that it attends to most."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.parts import cut
from headscope.interp.errors import HeadscopeError
from headscope.interventions.attention.score_edit import ScoresEdit
from headscope.interventions.positions.documents import Documents, listed
from headscope.kernels.request import Request


@dataclass(frozen=True, eq=False)
class SelectContexts(ScoresEdit):
    """Rows after the contexts keep ``keep`` of them: the selective repair of parallel encoding (Zhang et al. 2025).

    A context's score is the sum of the ``top`` largest attention weights inside it, of each head and row. The others'
    weights become 0, and the row is normalised again; what stands before the contexts and after them is never cleared.
    Put it after ``ParallelContexts``, or alone: then it selects among contexts that were read one after the other. With
    no more than ``keep`` contexts nothing changes.

    What differs from the authors' code: sums of weights below 1e-5 are not clamped, and contexts of a batch may stand
    in different places. Its two ways to choose are ``over="head"`` (theirs for language modelling) and ``over="pass"``
    (theirs for tasks, "head,seq"): one choice for all heads and rows of a layer's call, by the sum of the 5 largest
    scores among them, so that rows also follow later ones, and a text that is read in pieces may get other choices
    than one that is read at once. ``over="heads"`` is one for all heads, a row at a time [OURS].

    Args:
        contexts: as ``ParallelContexts`` takes them.
        keep: how many contexts a row keeps.
        top: how many weights of a context count.
        over: ``"head"``, ``"heads"`` or ``"pass"``.
        strength: 1 takes the other contexts away, s < 1 leaves 1 - s of their weight before renormalisation.
    """

    _: KW_ONLY
    contexts: Any = "document"
    keep: int = 2
    top: int = 5
    over: Literal["head", "heads", "pass"] = "head"

    source: ClassVar[str] = "arXiv 2412.16545; zzsfornlp/parallel_context_encoding_analysis @ fb284f3"
    unit: ClassVar[str] = "share of a context's weight removed"
    nothing: ClassVar[str] = "no row that was meant comes after more contexts than it keeps"

    def __post_init__(self) -> None:
        for name in ("keep", "top"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise HeadscopeError(f"SelectContexts: {name} must be a whole number of 1 or more, not {value!r}")
        if self.over not in ("head", "heads", "pass"):
            raise HeadscopeError(f"SelectContexts: over must be 'head', 'heads' or 'pass', not {self.over!r}")
        if not isinstance(self.contexts, str):
            listed(self.contexts, "contexts")
        super().__post_init__()

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """The scores of contexts that are not kept."""
        if call.cross:
            raise HeadscopeError("SelectContexts edits self-attention; cross-attention has no rows after a context")
        docs = Documents.of(self.contexts, call, "contexts")
        count = docs.first.shape[1]
        first = max(0, int(docs.end.min()) - call.mask.query_offset)
        if not docs.reached or count <= self.keep or first >= call.query.shape[2]:
            return call
        after = torch.arange(call.query.shape[2], device=mine.device) + call.mask.query_offset >= docs.end[:, None]
        mine = mine & (after & ((docs.length > 0).sum(1) > self.keep)[:, None])[:, None]
        self.note(mine)
        score = self._together(self._scores(call, docs, first), after[:, first:])
        score = score.masked_fill((docs.length == 0)[:, None, None], -1.0)
        order = score.argsort(dim=-1, descending=True, stable=True)
        dropped = torch.ones_like(score, dtype=torch.bool).scatter(-1, order[..., : self.keep], False)
        dropped = dropped.expand(-1, call.query.shape[1], after.shape[1] - first, -1)
        bias = -math.inf if self.strength == 1 else math.log1p(-self.strength)
        row, key, of_keys = call.mask.query_offset + first, call.mask.key_offset, docs.of_keys

        def selected(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            context = of_keys[b, k - key]
            gone = (context >= 0) & dropped[b, h, (q - row).clamp(min=0), context.clamp(min=0)]
            return torch.where(gone, s + bias, s)

        return self.only(call, mine, selected)

    def _together(self, score: Tensor, after: Tensor) -> Tensor:
        """Scores (batch, head or 1, row or 1, context) that share a choice, from those of each head and row."""
        if self.over == "heads":
            return score.topk(min(5, score.shape[1]), 1).values.sum(1, keepdim=True)
        if self.over == "pass":
            each = score.masked_fill(~after[:, None, :, None], 0.0).flatten(1, 2)  # (batch, head * row, context)
            return each.topk(min(5, each.shape[1]), 1).values.sum(1)[:, None, None]
        return score

    def _scores(self, call: AttentionCall, docs: Documents, first: int) -> Tensor:
        """The largest weights of each context, summed, of the rows from ``first`` on: (batch, head, row, context)."""
        batch, _, queries, _ = call.query.shape
        rows, whole = slice(first, queries), slice(0, batch)
        total = cut(call, whole, rows, slice(0, call.key.shape[2])).attend(Request(output=False, lse=True)).lse
        assert total is not None
        found = []
        for number in range(docs.first.shape[1]):
            held = docs.of_keys == number
            at = held.any(0).nonzero()[:, 0]
            if not len(at):  # behind a window whose cache does not hold it any more
                found.append(torch.zeros_like(total))
                continue
            keys = slice(int(at[0]), int(at[-1]) + 1)
            bias = torch.where(held[:, None, keys], 0.0, -torch.inf)
            part = cut(call, whole, rows, keys).with_(sinks=None).with_key_bias(bias)
            got = part.attend(Request(output=False, lse=True, top=self.top))
            assert got.top_mass is not None and got.lse is not None
            found.append(got.top_mass.sum(-1) * (got.lse - total).exp())
        return torch.stack(found, -1)
