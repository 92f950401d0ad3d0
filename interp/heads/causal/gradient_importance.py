"""Importance by gradient: how fast the loss changes where a head's output is scaled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored
from headscope.interp.heads.causal.gates import TokenGates, gated, log_probabilities
from headscope.interp.heads.causal.importance import ImportanceMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.journal import Trial


@dataclass(frozen=True, kw_only=True)
class GradientImportance(ImportanceMethod):
    """Score heads by the mean over texts of |dL / d xi|, xi a factor on their output that is 1: sum over z of z dL/dz.

    Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (arXiv 1905.10650, Eq. 2, Section 4.1):
    I_h = E_x |dL(x) / d xi_h| = E_x |Att_h(x)^T dL(x) / dAtt_h(x)|. Att_h may be the head's z or what the output
    projection makes of it: the product is the same. To first order it is what ``ablation_importance`` measures,
    without its sign, from one backward pass a text. The loss is ``ImportanceMethod``'s. The authors then divide by
    the layer's L2 norm over heads (after Molchanov et al. 2017), which only orders heads within layers:
    ``normalised(scores)`` does it, once all texts are known.

    What differs: the authors' code (classifier_eval.py of their fork of pytorch-pretrained-bert) takes the absolute
    value of every token's product and averages over tokens, so that tokens never cancel: ``over="token"``. (It divides
    the last layer by another number than the others; the norm of the layer removes that.)

    What it does not show: what zeroing the head does when that is a large step: where the loss is flat at 1 and steep
    before, the gradient sees nothing.

    Args:
        over: "text", the absolute value of a text's sum, as the equation has it, or "token", the mean of the absolute
            values of its tokens, as the code has it (so of another scale).
    """

    name: ClassVar[str] = "gradient_importance"
    source: ClassVar[str] = "arXiv 1905.10650"
    tests: ClassVar[str] = "heads/test_importance.py"
    reproduced: ClassVar[str] = (
        "z . dL/dz by autograd of a plain pass, per text and per token; the slope of the loss by a central "
        "difference; on SmolLM2 it ranks heads as ablation does, far above chance"
    )
    not_reproduced: ClassVar[str] = "the paper's pruning curves: BERT on MNLI, WMT"

    over: Literal["text", "token"] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over not in ("text", "token"):
            raise HeadscopeError(f"over={self.over!r}: choose 'text' or 'token'")

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        x, y = self.examples(lm)[trial["sample"]]
        return 3 * (len(x) + len(y)), 0  # backward: twice forward

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        found = np.full((lm.info.layers, lm.info.heads), np.nan)
        gates = TokenGates()
        with gated(lm, gates):
            loss = -log_probabilities(lm, gates, [self.examples(lm)[trial["sample"]]])[0, 0]
            grads = torch.autograd.grad(loss, list(gates.at.values()))
        for layer, grad in zip(gates.at, grads, strict=True):
            parts = grad[0].double()  # (head, query)
            own = parts.sum(-1).abs() if self.over == "text" else parts.abs().mean(-1)
            found[layer, : len(own)] = own.cpu().numpy()
        return found, {"loss": float(loss.detach())}


def normalised(scores: HeadScores) -> HeadScores:
    """Scores divided by the L2 norm over heads of their layer's mean scores, as the authors do before they prune.

    Afterwards every layer's mean scores have a norm of 1: heads of different layers are no longer to be compared. A
    layer of zeros stays.
    """
    norms = np.sqrt(np.nansum(scores.mean**2, axis=1))
    divided = scores.trials / np.where(norms > 0, norms, 1.0)[None, :, None]
    return replace(scores, trials=divided, provenance={**scores.provenance, "unit": "share of the layer's norm"})
