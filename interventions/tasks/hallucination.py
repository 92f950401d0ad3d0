"""Captions that name what is not there: CHAIR on drawn scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.scenes.language import hallucinated, named, request
from headscope.interp.prompts.scenes.world import COMPANIONS
from headscope.interp.runs.journal import Trial
from headscope.interventions.tasks.base import check_among
from headscope.interventions.tasks.scenes import SceneTask, alone, balanced, fog, pairs, together

KEYS = {"alone": alone, "together": together, "fog": fog}
KINDS = (*KEYS, "balanced")


@dataclass(frozen=True, kw_only=True)
class Hallucination(SceneTask):
    """Describe a picture; 1 where the caption names a class that the scene lacks, else 0: lower is better.

    CHAIR of Rohrbach et al. 2018 (arXiv 1809.02156): the mean is CHAIR_s, the share of captions with a hallucinated
    object; ``chair_i`` is the share of hallucinated objects among all that are named. Classes are counted by their
    words, plurals too; nothing else is looked for (colours and places may be wrong). Scenes are drawn, so what is there
    is known and no synonym list is needed.

    Kinds: "alone": an object whose usual companion is absent, ``samples`` of each of the five pairs, of which the last
    (flower, sun) has no prior; "together": the companion is there; "fog": as "alone", but nothing can be seen, so that
    with ``mention`` a companion is named for the word alone; "balanced": 3 to 8 objects of any class, outside
    what captions were trained on. Beside CHAIR: ``recall`` of the classes that are there, ``words``, ``place`` (of
    hallucinated objects in their caption's list, 0 first to 1 last), and how often each absent companion is named. A
    method that shortens captions or names less lowers CHAIR without seeing better: read ``recall`` with it.

    Args:
        kinds: of the four.
        detail: a sentence an object, with its place; else one list.
        mention: the question names the scene's own object ("Describe the image with the boat ...").
    """

    kinds: Sequence[str] = ("alone",)
    detail: bool = True
    mention: bool = False
    max_new_tokens: int = 110

    name: ClassVar[str] = "hallucination"
    metric: ClassVar[str] = "CHAIR_s"
    unit: ClassVar[str] = "share of captions"
    higher_is_better: ClassVar[bool | None] = False
    source: ClassVar[str] = "Rohrbach et al. 2018, arXiv 1809.02156"

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str):
            object.__setattr__(self, "kinds", (self.kinds,))
        super().__post_init__()
        check_among(self, kinds=KINDS)

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """``samples`` scenes of every pair and kind; of "balanced" as many in all."""
        made: list[Trial] = []
        for kind in dict.fromkeys(self.kinds):
            for number in range(self.samples):
                for name in pairs():
                    if kind == "balanced":
                        key, asked = balanced(3, number * len(pairs()) + pairs().index(name), self.seed), None
                    else:
                        key, asked = KEYS[kind](name, number, self.seed), name
                    question = request(detail=self.detail, mention=asked if self.mention else None)
                    made.append({"kind": kind, "of": asked or "", "scene": key, "question": question})
        return made

    def grade(self, lm: LanguageModel, trial: Trial, response: str) -> dict[str, Any]:
        """Score (1: something is hallucinated), how many are named and hallucinated, which, recall, words, place."""
        there, said = self.scene(trial).names, named(response)
        wrong = hallucinated(response, there)
        places = [i / max(1, len(said) - 1) for i, name in enumerate(said) if name not in there]
        missing = self.scene(trial).missing_companions()
        return {
            "score": float(bool(wrong)),
            "named": len(said),
            "hallucinated": len(wrong),
            "which": ", ".join(wrong),
            "companions": ", ".join(missing),
            "companions_named": ", ".join(name for name in missing if name in said),
            "recall": len(there & set(said)) / len(there),
            "words": len(response.split()),
            **({"place": float(np.mean(places))} if places else {}),
        }

    def summarise(self, trials: pd.DataFrame) -> dict[str, float]:
        """CHAIR_i, recall, words, place, and the share of absent companions that are named, by pair."""
        found = {
            "chair_i": float(trials["hallucinated"].sum() / max(1, trials["named"].sum())),
            "recall": float(trials["recall"].mean()),
            "words": float(trials["words"].mean()),
        }
        if "place" in trials:  # something is hallucinated
            found["place"] = float(trials["place"].mean())
        for name, companion in COMPANIONS.items():
            able = trials["companions"].str.split(", ").map(lambda names, own=companion.name: own in names)
            if able.any():
                told = trials.loc[able, "companions_named"].str.split(", ")
                found[f"{name} -> {companion.name}"] = float(told.map(lambda n, own=companion.name: own in n).mean())
        return found
