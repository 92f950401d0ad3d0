"""Where one object is from another: spatial questions on crowded scenes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.scenes.language import question
from headscope.interp.runs.journal import Trial
from headscope.interventions.tasks.scenes import SceneTask, balanced, known


@dataclass(frozen=True, kw_only=True)
class Spatial(SceneTask):
    """Ask where one object is relative to another (left, right, above, below); 1 where right, else 0.

    The kind of question of WhatsUp (Kamath et al. 2023, arXiv 2310.19785), on which ScalingVis and AdaptVis are judged
    (Chen et al. 2025, arXiv 2503.01773), on scenes of 6 to 8 objects that may overlap. The direction is that of the
    larger difference of centres, which exceeds the other by 3 pixels of 120 at least. Four answers: by chance 0.25.

    Beside accuracy: that of every direction.
    """

    samples: int = 100
    max_new_tokens: int = 4

    name: ClassVar[str] = "spatial"
    metric: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share of questions"
    source: ClassVar[str] = "after Kamath et al. 2023, arXiv 2310.19785"

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """A question of every scene that has one to ask."""
        made: list[Trial] = []
        number = 0
        while len(made) < self.samples:
            key = balanced(6, number, self.seed)
            number += 1
            asked = question(random.Random(f"spatial {key}"), known(key), "relation")
            if asked is not None:
                made.append({"scene": key, "question": asked[0], "answer": asked[1]})
        return made

    def grade(self, lm: LanguageModel, trial: Trial, response: str) -> dict[str, Any]:
        """Score (1 or 0): the answer's first word."""
        said = response.strip().lower().split(".")[0]
        return {"score": float(said == trial["answer"].lower().rstrip("."))}

    def summarise(self, trials: pd.DataFrame) -> dict[str, float]:
        """Accuracy of every direction."""
        each = trials.groupby(trials["answer"].str.rstrip(".").str.lower())["score"].mean()
        return {str(name): float(value) for name, value in each.items()}
