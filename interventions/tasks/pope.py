"""Yes or no: is an object there? POPE on drawn scenes."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.scenes.language import exists
from headscope.interp.prompts.scenes.world import CLASSES, POPULAR, Scene
from headscope.interp.runs.journal import Trial
from headscope.interventions.tasks.base import check_among
from headscope.interventions.tasks.scenes import SceneTask, alone, balanced, known, pairs

SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True, kw_only=True)
class Pope(SceneTask):
    """Ask whether an object is in a picture, as often of one that is as of one that is not; 1 where right, else 0.

    POPE of Li et al. 2023 (arXiv 2305.10355). What is asked after in vain: "random", any class that is absent;
    "popular", one of the most frequent of the world's scenes; "adversarial", the absent companion of an object that is
    there. Their images hold at least three objects and give three questions of either answer; here a scene gives one of
    either answer a split [OURS], which is a group. An answer that begins with neither word is wrong.

    Beside accuracy: precision, recall, F1 (of "yes") and the share of "yes", of every split.

    Args:
        splits: of the three.
        balanced_scenes: scenes of 3 to 8 objects of any class, not those of ``hallucination``.
    """

    splits: Sequence[str] = SPLITS
    balanced_scenes: bool = False
    samples: int = 40
    max_new_tokens: int = 3

    name: ClassVar[str] = "pope"
    metric: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share of questions"
    source: ClassVar[str] = "Li et al. 2023, arXiv 2305.10355"

    def __post_init__(self) -> None:
        if isinstance(self.splits, str):
            object.__setattr__(self, "splits", (self.splits,))
        super().__post_init__()
        check_among(self, splits=SPLITS)

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """Two questions of every split and scene; scenes that have none to ask after are passed over."""
        made: list[Trial] = []
        for split in dict.fromkeys(self.splits):
            number, asked = 0, 0
            while asked < self.samples:
                key = self._key(number)
                number += 1
                absent = _absent(known(key), split)
                if not absent:
                    continue
                asked += 1
                draw = random.Random(f"{split} {key}")
                for name, there in ((draw.choice(sorted(known(key).names)), True), (draw.choice(absent), False)):
                    question, answer = exists(name, there)
                    own = {"split": split, "scene": key, "group": f"{split} {key}", "object": name}
                    made.append({**own, "question": question, "there": there, "answer": answer})
        return made

    def _key(self, number: int) -> str:
        if self.balanced_scenes:
            return balanced(3, number, self.seed)
        return alone(pairs()[number % len(pairs())], number // len(pairs()), self.seed)

    def grade(self, lm: LanguageModel, trial: Trial, response: str) -> dict[str, Any]:
        """Score (1 or 0), and whether it says yes, no, or neither ("")."""
        word = re.match(r"\W*(yes|no)\b", response.lower())
        said = word.group(1) if word else ""
        return {"score": float(said == ("yes" if trial["there"] else "no")), "said": said}

    def summarise(self, trials: pd.DataFrame) -> dict[str, float]:
        """Accuracy, precision, recall, F1 and the share of yes, of every split."""
        found: dict[str, float] = {}
        for split, own in trials.groupby("split", sort=False):
            yes, there = own["said"] == "yes", own["there"].astype(bool)
            right = float((yes & there).sum())
            precision, recall = right / max(1, yes.sum()), right / max(1, there.sum())
            f1 = 2 * precision * recall / (precision + recall) if right else 0.0
            values = {"accuracy": own["score"].mean(), "precision": precision, "recall": recall, "f1": f1}
            found |= {f"{split}, {name}": float(value) for name, value in (values | {"yes": yes.mean()}).items()}
        return found


def _absent(scene: Scene, split: str) -> list[str]:
    """What may be asked after in vain."""
    if split == "adversarial":
        return list(scene.missing_companions())
    return [name for name in (POPULAR if split == "popular" else CLASSES) if name not in scene.names]
