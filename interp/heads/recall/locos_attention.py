"""LOCOS without what heads write: attention to the needle against as much of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from headscope.interp.heads.recall.answer_rows import Answer, AnswerMethod
from headscope.interp.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class LocosAttention(AnswerMethod):
    """Score heads by how much more they attend to the needle than to as much of the rest while the answer is emitted.

    The attention-only control of Gema et al. 2026 (arXiv 2607.01002; locos/detectors/attention_spatial.py): ``locos``
    with phi_tj = A_tj. Where it ranks heads as ``locos`` does, the values and the projection add nothing.

    What it does not show: what is read there, and whether it says anything about the answer.
    """

    name: ClassVar[str] = "locos_attention"
    unit: ClassVar[str] = "mass"
    source: ClassVar[str] = "arXiv 2607.01002"
    tests: ClassVar[str] = "heads/test_recall.py"
    reproduced: ClassVar[str] = "attention alone against eager weights, as `locos`"
    not_reproduced: ClassVar[str] = "NoLiMa's questions, which models of this size fail"

    def of_answer(self, lm: LanguageModel, answer: Answer) -> NDArray[np.float64]:
        """The contrast of the masses, over the answer's rows."""
        return answer.mean(lm, lambda row: row.contrast(row.mass), answer.steps)
