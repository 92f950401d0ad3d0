"""Base of the tasks that ask about drawn scenes, of which everything is known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.pictures import Message
from headscope.interp.prompts.scenes.pictures import pictures
from headscope.interp.prompts.scenes.world import COMPANIONS, SIZE, Scene, balanced_scene, prior_scene
from headscope.interp.runs.journal import Trial
from headscope.interventions.tasks.base import check_among, check_least
from headscope.interventions.tasks.vision import VisionTask

IMAGES = ("own", "other", "blank")


@dataclass(frozen=True, kw_only=True)
class SceneTask(VisionTask):
    """Base of the tasks on scenes of ``headscope.interp.prompts.scenes``, as ``llava-smollm2`` knows them; any model of
    images and text answers them. A subclass writes ``trials`` (each with a ``scene``, its key) and ``grade``.

    Args:
        samples: scenes; of ``hallucination`` of each pair.
        image: "own"; "other": the picture of another scene of the same kind, which shares what the question gives away;
            "blank": a grey one, so that what is said is said from the words alone.
        seed: of the scenes.
    """

    samples: int = 20
    image: str = "own"
    seed: int = 0
    batch: int = 20

    higher_is_better: ClassVar[bool | None] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, samples=1)
        check_among(self, image=IMAGES)

    def scene(self, trial: Trial) -> Scene:
        """The scene that a trial is about."""
        return known(str(trial["scene"]))

    def chat(self, lm: LanguageModel, trial: Trial) -> Sequence[Message]:
        """The picture, then the question."""
        parts: list[Any] = [
            {"type": "image", "image": self._pixels(trial)},
            {"type": "text", "text": trial["question"]},
        ]
        return [{"role": "user", "content": parts}]

    def _pixels(self, trial: Trial) -> NDArray[np.uint8]:
        if self.image == "blank":
            return np.full((SIZE, SIZE, 3), 128, np.uint8)
        return painted(str(trial["scene"]) + (" (another)" if self.image == "other" else ""))


def alone(name: str, number: int, seed: int) -> str:
    """The key of a clear scene with one object that has a companion, which is absent."""
    return f"{seed}/alone/{name}/{number}"


def together(name: str, number: int, seed: int) -> str:
    """The key of a clear scene with an object and its companion."""
    return f"{seed}/together/{name}/{number}"


def fog(name: str, number: int, seed: int) -> str:
    """The key of a scene as ``alone``'s in which nothing can be seen."""
    return f"{seed}/fog/{name}/{number}"


def balanced(least: int, number: int, seed: int) -> str:
    """The key of a scene of ``least`` to 8 objects without a prior."""
    return f"{seed}/balanced/{least}/{number}"


@lru_cache(4096)
def known(key: str) -> Scene:
    """The scene of a key; a key with " (another)" is of a scene of the same kind."""
    _, kind, what, *_ = key.split("/")
    draw = random.Random(key)
    if kind == "balanced":
        return balanced_scene(draw, int(what), 8)
    return prior_scene(draw, objects=[what], companions=kind == "together", fog=float(kind == "fog"))


@lru_cache(1024)
def painted(key: str) -> NDArray[np.uint8]:
    """Its picture (height, width, 3), drawn by itself."""
    return pictures([known(key)])[0].pixels


def pairs() -> tuple[str, ...]:
    """The objects that have companions, the one without a prior last."""
    return tuple(COMPANIONS)
