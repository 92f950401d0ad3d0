"""Importance by ablation: what the loss rises by where one head writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored
from headscope.interp.heads.causal.gates import gated, log_probabilities
from headscope.interp.heads.causal.importance import ImportanceMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.journal import Trial


@dataclass(frozen=True, kw_only=True)
class AblationImportance(ImportanceMethod):
    """Score heads by how much the loss rises where their output is zero: L without the head - L, in nats.

    Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (arXiv 1905.10650, Section 3.2): one head's mask
    xi_h is set to 0, all others stay 1, and the model is not trained again. z is zeroed at all tokens. A negative score
    says that the model predicts better without the head. The loss is ``ImportanceMethod``'s.

    What differs: the authors report the change of a task's BLEU or accuracy on its test set; here the loss, which moves
    with every head. It takes a forward pass a head and text, so few, short texts are the default [OURS].

    What it does not show: what heads do together (two heads that do the same are both unimportant), and the difference
    between a head that is needed and one whose bias is: zero is no output that the head ever gives. ``AblateHeads``
    has other replacements.

    Args:
        together: heads whose passes run as one batch; it changes no number, only memory and time.
    """

    name: ClassVar[str] = "ablation_importance"
    source: ClassVar[str] = "arXiv 1905.10650"
    tests: ClassVar[str] = "heads/test_importance.py"
    reproduced: ClassVar[str] = (
        "the loss with one head's z zeroed by a hook on the output projection's input; a head that writes "
        "nothing has none"
    )
    not_reproduced: ClassVar[str] = "the paper's BLEU and accuracies: WMT's encoder-decoder and BERT"
    unlisted: ClassVar[tuple[str, ...]] = ("together",)

    length: int = 32
    samples: int = 4
    together: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.together < 1:
            raise HeadscopeError(f"together={self.together}: run at least 1 head in a forward pass")

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        x, y = self.examples(lm)[trial["sample"]]
        return (1 + lm.info.layers * lm.info.heads) * (len(x) + len(y)), 0

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        example = [self.examples(lm)[trial["sample"]]]
        found = np.full((lm.info.layers, lm.info.heads), np.nan)
        with gated(lm) as gates, torch.no_grad():
            whole = float(log_probabilities(lm, gates, example))
            heads = [(layer, head) for layer in sorted(gates.layers) for head in range(lm.info.heads)]
            for first in range(0, len(heads), self.together):
                part = heads[first : first + self.together]
                values = torch.ones(len(part), *found.shape, device=lm.device)
                for mask, (layer, head) in enumerate(part):
                    values[mask, layer, head] = 0
                gates.values = values
                without = log_probabilities(lm, gates, example)[:, 0].double().cpu().numpy()
                found[tuple(zip(*part, strict=True))] = whole - without
        return found, {"loss": -whole}
