"""LOCOS: heads that write the answer while they read the needle (logit contribution, needle against the rest)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from headscope.interp.heads.recall.answer_rows import Answer, AnswerMethod
from headscope.interp.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Locos(AnswerMethod):
    """Score heads by how much more they write towards the answer from the needle than from as much of the rest.

    Gema et al. 2026, "Logit-Contribution Scoring Identifies Non-Literal Retrieval Heads" (arXiv 2607.01002;
    locos/detectors/logit_contrib.py). For the row t that emits the answer's token y_t, and each key j,
    phi_tj = A_tj u_y^T W_O v_j: u_y the token's unembedding row, W_O the head's slice of the output projection. A
    trial's score is the mean over the answer's rows of sum_(needle) phi - |needle| / |rest| * sum_(rest) phi, in logits
    before the final norm, which the authors leave out, as they do a norm after the projection (Gemma). The rest is
    every other key up to the row. The needle is the whole hidden sentence. The answer's rows are those that emit its
    tokens, as they stand alone, in order, or else its text, without case; a trial without them, or with a ROUGE-1
    recall up to ``threshold``, does not count. A head's score is the mean over trials.

    What differs: the authors probe with NoLiMa, whose questions share no word with the needle; here the questions are
    Wu et al.'s kind unless ``paraphrased``, which small models fail. Keys that a sliding window hides count in |rest|
    (with mass 0); their cache forgets some of them, and the count with them.

    What it does not show: what the head does through later layers, or that the model needs it. (The authors' ablation
    zeroes a head's query, ``AblateHeads(how="uniform")``, not what it writes.) The authors' controls are methods of
    their own here: ``locos_attention`` (without what is written), ``locos_dla`` (without the contrast) and
    ``locos_contrastive`` (answer's rows against the others').
    """

    name: ClassVar[str] = "locos"
    unit: ClassVar[str] = "logits before the final norm"
    source: ClassVar[str] = "arXiv 2607.01002"
    tests: ClassVar[str] = "heads/test_recall.py"
    reproduced: ClassVar[str] = (
        "phi against eager weights and the projection's slices; SmolLM2's retrieval heads write over ten "
        "times as much towards the answer as others"
    )
    not_reproduced: ClassVar[str] = "NoLiMa's questions, which models of this size fail"

    def of_answer(self, lm: LanguageModel, answer: Answer) -> NDArray[np.float64]:
        """What is written of z's contrast: W_O is linear, so that it is the contrast of what both parts write."""
        return answer.logits(lm, lambda row: row.contrast(row.z))
