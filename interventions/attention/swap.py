"""Swapped weights of two keys: an anchor gets the attention of the right answer, and the other way round."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.spans import by_example
from headscope.interventions.attention.pattern_edit import PatternEdit
from headscope.interventions.attention.score_edit import weight
from headscope.interventions.phases import require_told
from headscope.kernels import reference
from headscope.kernels.score_edits import ScoreEdit


@dataclass(frozen=True, eq=False)
class SwapKeys(PatternEdit):
    """Exchange the weights of two keys in chosen rows: A'[first] = A[second], A'[second] = A[first].

    The attention recalibration of Li & Gao 2024, "Anchored Answers" (arXiv 2405.03205), which swaps the anchor's token
    ("A:") and that of the right answer in the last row of heads that favour the anchor. Its authors' code holds the MLP
    part alone, so this follows their README [OURS]. As the two scores are exchanged before softmax, the row keeps its
    normaliser, and this is the exchange after it, to rounding.

    Rows that do not see both keys stay as they are. The paper edits the last row of a prompt: ``during="answer"`` is
    that row and those of generated tokens, ``positions`` any others. Their other edit, of an MLP's value vector, is
    ``EditValueVectors``.

    What it does not show: that the anchor's weight caused the answer; the values of both keys, which are read with the
    exchanged weights, differ in more than their letter.

    Args:
        first, second: one token an example each: ``(position, position + 1)``, one such pair an example, or the name of
            a published span.
        strength: s gives A'[first] = (1 - s) A[first] + s A[second]; at 0.5 both keys get the mean.
    """

    _: KW_ONLY
    first: Any = (0, 1)
    second: Any = (1, 2)

    source: ClassVar[str] = "arXiv 2405.03205"
    unit: ClassVar[str] = "share of two weights exchanged"

    nothing: ClassVar[str] = "no row that was meant sees both keys, or they are one"

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """The scores of both keys exchanged on the rows that are meant."""
        require_told(call, "the two keys")
        one, two = (self._place(call, span, name) for span, name in ((self.first, "first"), (self.second, "second")))
        at_one, at_two = scores_at(call, one), scores_at(call, two)
        seen = (at_one > -torch.inf) & (at_two > -torch.inf)  # (batch, head, query)
        mine = mine & seen & (one != two)[:, None, None]
        self.note(mine)
        stays, goes = (math.log(x) if x else -math.inf for x in (1.0 - self.strength, self.strength))
        new_one = torch.logaddexp(at_one + stays, at_two + goes)
        new_two = torch.logaddexp(at_two + stays, at_one + goes)
        at = torch.arange(call.key.shape[2], device=one.device) + call.mask.key_offset
        of_one, of_two = ((at == place[:, None])[:, None] for place in (one, two))
        emptied = weight(call, mine, "score", rows=-1.0, keys=of_one | of_two)  # to exactly 0
        filled = (weight(call, mine, rows=new, keys=own) for new, own in ((new_one, of_one), (new_two, of_two)))
        return call.with_score_edit(ScoreEdit.of(emptied, *filled))

    def _place(self, call: AttentionCall, span: Any, name: str) -> Tensor:
        """The key's position (batch,), padding counted.

        Raises:
            HeadscopeError: not one token an example.
        """
        rows, batch = by_example(span), call.query.shape[0]
        if any(len(row) != 1 or row[0][1] - row[0][0] != 1 for row in rows) or len(rows) not in (1, batch):
            raise HeadscopeError(
                f"SwapKeys: {name} must be one token an example, (position, position + 1), not {str(rows)[:60]}"
            )
        at = torch.tensor([row[0][0] for row in rows], device=call.query.device).expand(batch)
        return at if call.mask.start is None else at + call.mask.start


def scores_at(call: AttentionCall, at: Tensor) -> Tensor:
    """The final score of one key an example, at positions ``at`` (batch,): (batch, head, query); -inf where hidden."""
    scores = call.inputs()
    scores = replace(scores, q=scores.q.to(scores.dtype), k=scores.k.to(scores.dtype), sinks=None)
    found = torch.full(scores.shape[:3], -torch.inf, dtype=scores.dtype, device=at.device)
    for place in sorted(set(at.tolist())):
        index = place - call.mask.key_offset
        if 0 <= index < scores.shape[3]:
            own = reference.dense_scores(scores.keys(slice(index, index + 1)))[..., 0]
            found = torch.where((at == place)[:, None, None], own, found)
    return found
