"""Attention to the needle while the answer is emitted, against other steps of the same generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.recall.answer_rows import Answer, AnswerMethod, Row
from headscope.interp.models.language_model import LanguageModel

EPSILON = 1e-9  # the authors', beside a trial's sum


@dataclass(frozen=True, kw_only=True)
class LocosContrastive(AnswerMethod):
    """Score heads by how much more they look at the needle while the answer is emitted than at other steps.

    The contrastive baseline of Gema et al. 2026 (arXiv 2607.01002; locos/detectors/contrastive.py). A row counts the
    share of its ``top`` heaviest keys that lie in the needle (the whole sentence), or with top=0 its mass there. R is
    the mean over the answer's rows minus the mean over all other generated rows (that of the token that ends the text
    among them), at least 0; where the model says nothing else, the first mean alone. A trial counts where some head's R
    reaches ``gate`` times needle / prompt, the mass of uniform attention, and is divided by the sum of R over all
    heads. A head's score is the mean over trials.

    What differs: the authors' pooling over trials, permutation filter and raw scores are no defaults of theirs, and are
    left out. ``forced`` leaves only a chat model's lead as other rows, and elsewhere none.

    What it does not show: how strong a head is, as a trial's scores add up to 1, however little all heads look; what
    the answer takes from the needle. A head that looks at the needle at every step scores 0.

    Args:
        top: heaviest keys of a row, or 0 for its mass.
        gate: how far above uniform attention some head must come for a trial to count; 0 keeps every trial.
    """

    name: ClassVar[str] = "locos_contrastive"
    unit: ClassVar[str] = "share of all heads' contrast"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    source: ClassVar[str] = "arXiv 2607.01002"
    tests: ClassVar[str] = "heads/test_recall.py"
    reproduced: ClassVar[str] = "the answer's rows against the others, on eager weights, as `locos`"
    not_reproduced: ClassVar[str] = "NoLiMa's questions, which models of this size fail"

    top: int = 10
    gate: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 0 or self.gate < 0:
            raise HeadscopeError(f"top={self.top} and gate={self.gate}: both are at least 0")

    @property
    def heaviest(self) -> int:
        return self.top

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        return {**super().parameters(lm), "top": self.top, "gate": self.gate}

    def of_answer(self, lm: LanguageModel, answer: Answer) -> NDArray[np.float64] | None:
        """A trial's shares, None where it does not reach the gate."""
        emitted = len(next(iter(answer.rows.values())))
        others = [t for t in range(emitted) if t not in set(answer.steps)]

        def looks(row: Row) -> Tensor:
            return row.top / self.top if self.top else row.mass[0]

        found = answer.mean(lm, looks, answer.steps)
        found = np.maximum(found - answer.mean(lm, looks, others) if others else found, 0.0)
        first, stop = answer.prompt.needle_span
        if np.nanmax(found) < self.gate * (stop - first) / len(answer.prompt.ids):
            return None
        return np.asarray(found / (np.nansum(found) + EPSILON))
