"""Forced patterns: a head's rows attend to chosen keys, whatever the head would have looked at."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interventions.attention.gradient import require_no_gradient
from headscope.interventions.attention.pattern_edit import PatternEdit
from headscope.interventions.attention.score_edit import weight
from headscope.kernels.request import Request
from headscope.kernels.score_edits import ScoreEdit


@dataclass(frozen=True, eq=False)
class ForcePattern(PatternEdit):
    """Force rows of heads onto chosen keys: A' = (1 - strength) A + strength t, t shared equally among ``onto``.

    The repair of Merullo et al. 2024, "Circuit Component Reuse Across Tasks" (arXiv 2310.08744): in Colored Objects
    the last row of three inhibition heads and of a negative mover head of GPT-2 medium is put on the two wrong colours,
    which takes accuracy from 49.6 % to 93.7 %. Neither the paper's abstract nor its code says which weights: equal
    shares are [OURS], as is the mixture below strength 1. ``onto`` is given an example, because prompts differ.

    t is shared among the keys of ``onto`` that the mask shows to a row (one that an earlier edit of scores cut takes
    its share and is still cut: do not name it); a row that sees none stays as it is, and the share of a sink logit
    (gpt-oss) is kept. The paper edits the last row of a prompt: ``during="answer"`` is that row and those of
    generated tokens, ``positions`` any others. Memory is that of rows x keys of ``onto``.

    What it does not show: that the heads would have looked there; it says what follows if they do.

    Args:
        onto: the keys, a span: positions, one list of pairs an example, or the name of a published one.
    """

    _: KW_ONLY
    onto: Any = (0, 1)

    source: ClassVar[str] = "arXiv 2310.08744"
    unit: ClassVar[str] = "share of a row that is forced"
    refused: ClassVar[dict[str, str]] = {
        "gradients": "below strength 1 or with sink logits: the sums of rows keep none"
    }

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """The scores that give the mixture, on the rows that are meant."""
        batch, queries, device = call.query.shape[0], call.query.shape[2], call.query.device
        onto = self.keys(call, self.onto, "onto").expand(batch, -1)
        mine = mine & (count := visible(call, onto)).gt(0)
        self.note(mine)
        share = -count.clamp(min=1).log()
        whole = torch.zeros(1, 1, queries, device=device)
        if self.strength < 1 or call.sinks is not None:
            require_no_gradient(call, "ForcePattern below strength 1, or in a model with sink logits,")
            found = call.with_(sinks=None).attend(Request(output=False, lse=True)).lse  # of the keys alone
            assert found is not None
            whole = found
        forced = (whole + share + math.log(self.strength)).expand(batch, call.query.shape[1], queries)
        if self.strength == 1:
            emptied, given = weight(call, mine, "score", rows=-1.0), weight(call, mine, rows=forced, keys=onto[:, None])
            others = weight(call, mine, keys=call.either(onto, 0.0, -math.inf)[:, None])
            return call.with_score_edit(ScoreEdit.of(emptied, given, others))
        offset, ahead = call.mask.query_offset, call.mask.key_offset
        mine, stays = mine.expand(batch, -1, -1), math.log(1.0 - self.strength)

        def mixed(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            row = q - offset
            added = torch.where(onto[b, k - ahead], forced[b, h, row].to(s.dtype), -torch.inf)
            return torch.where(mine[b, h, row], torch.logaddexp(s + stays, added), s)

        return call.with_score_edit(ScoreEdit(mixed))


def visible(call: AttentionCall, keys: Tensor) -> Tensor:
    """How many of the ``keys`` (batch, key) each row sees: (batch, head or 1, query), float."""
    at = keys.any(0).nonzero()[:, 0]
    rows = torch.arange(call.query.shape[2], device=keys.device)
    if not len(at):
        return torch.zeros(keys.shape[0], 1, len(rows), device=keys.device)
    of_rule = None if call.mask.rule is None else torch.arange(call.query.shape[1], device=keys.device)
    seen = call.mask.tile(rows, at, of_rule)
    held = keys[:, at][:, None, None]
    held = held.expand(-1, -1, len(rows), -1) if seen is None else held & seen
    return held.sum(-1).to(torch.promote_types(call.query.dtype, torch.float32))
