"""How far an edit moves the model's predictions on neutral text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.journal import Trial
from headscope.interventions.tasks.text_loss import TextLoss

UNEDITED = "unedited"
ROWS = 64  # of logits that are compared at a time


@dataclass(frozen=True)
class TextKL(TextLoss):
    """Mean KL(unedited || edited) of the next-token predictions on prose, in nats a token: an edit's side effect.

    sum_x p(x) (log p(x) - log q(x)) with p of the unedited model and q of the edited one, averaged over all positions
    of a passage [OURS], the last included: its prediction is one, too. The direction says what text of the unedited
    model loses under the edited one: it is large where the edit makes likely tokens unlikely. Logits are compared in
    float64; it is exactly 0 where they are equal, as without an edit. Unlike ``text_loss`` it needs no right answer,
    and an edit that makes some tokens better and others worse does not come out as nothing.

    The unedited model reads each passage once more, and its logits (token, vocabulary) stay in the model's dtype while
    the passage's conditions run: one passage at a time.

    What it does not show: whether the change is for the worse. It is never negative, so that its p against no edit only
    says that there was an edit: compare it with that of random heads or vectors. ``written`` is as in
    ``text_loss``: without it edits that act while decoding change nothing here, and those of ``"answer"`` one row.
    """

    name: ClassVar[str] = "text_kl"
    metric: ClassVar[str] = "KL to the unedited model"
    unit: ClassVar[str] = "nats per token"
    higher_is_better: ClassVar[bool | None] = False
    source: ClassVar[str] = "Kullback and Leibler 1951, doi:10.1214/aoms/1177729694"

    def prepare(self, lm: LanguageModel, trial: Trial) -> Trial:
        """The trial with the unedited model's logits."""
        return {**trial, UNEDITED: self.logits(lm, trial)}

    def run(self, lm: LanguageModel, trial: Trial) -> dict[str, Any]:
        """The divergence of the model as it is from the one that ``prepare`` saw, also of the position that moved most.

        Raises:
            HeadscopeError: a trial that was not prepared.
        """
        if UNEDITED not in trial:
            raise HeadscopeError(f"{self.name} compares with the unedited model: run(lm, prepare(lm, trial))")
        each = divergence(trial[UNEDITED], self.logits(lm, trial))
        return {"score": float(each.mean()), "largest": float(each.max()), "position": int(each.argmax())}


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of every row of logits (token, vocabulary), in nats, float64."""
    found = []
    for first in range(0, len(p), ROWS):
        log_p, log_q = (x[first : first + ROWS].double().log_softmax(-1) for x in (p, q))
        gap = torch.where(log_p > -torch.inf, log_p - log_q, 0.0)  # a token that p rules out adds nothing
        found.append((log_p.exp() * gap).sum(-1))
    return torch.cat(found)
