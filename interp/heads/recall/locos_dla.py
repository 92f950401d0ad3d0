"""LOCOS without its contrast: direct logit attribution of the answer, from wherever heads read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from headscope.interp.heads.recall.answer_rows import Answer, AnswerMethod
from headscope.interp.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class LocosDLA(AnswerMethod):
    """Score heads by how much they write towards the answer while it is emitted, from all keys (the DLA control).

    The control of Gema et al. 2026 (arXiv 2607.01002; locos/detectors/dla.py) for the contrast in space: the mean over
    the answer's rows of sum_j A_tj u_y^T W_O v_j, with u_y and W_O as of ``locos``, before the final norm. Direct logit
    attribution elsewhere (``headscope.probes.lenses``) divides by the final norm's scale and takes an average or
    another token away; this does neither, as the authors.

    What it does not show: where the head reads, so that a head which always writes common words scores too.
    """

    name: ClassVar[str] = "locos_dla"
    unit: ClassVar[str] = "logits before the final norm"
    source: ClassVar[str] = "arXiv 2607.01002"
    tests: ClassVar[str] = "heads/test_recall.py"
    reproduced: ClassVar[str] = "direct logit attribution against eager weights and the projection's slices, as `locos`"
    not_reproduced: ClassVar[str] = "NoLiMa's questions, which models of this size fail"

    def of_answer(self, lm: LanguageModel, answer: Answer) -> NDArray[np.float64]:
        """What is written of all that is read."""
        return answer.logits(lm, lambda row: row.z.sum(0))
