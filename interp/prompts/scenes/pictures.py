"""Scenes as pictures that a processor takes, with the boxes of what is in them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headscope.interp.prompts.scenes.drawing import draw
from headscope.interp.prompts.scenes.language import called, single
from headscope.interp.prompts.scenes.world import Scene, prior_scene

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True, eq=False)
class Picture:
    """A scene with its ``pixels`` (height, width, 3) in bytes."""

    scene: Scene
    pixels: NDArray[np.uint8]

    @property
    def boxes(self) -> dict[str, Box]:
        """The box of every object whose class stands in the scene once, by colour and class."""
        return {called(thing): thing.box for thing in single(self.scene)}


def pictures(scenes: Sequence[Scene], seed: int = 0) -> list[Picture]:
    """Every scene drawn by itself, so that it looks the same whatever stands beside it."""
    drawn = [draw([scene], seed=1_000_003 * seed + number).pixels[0] for number, scene in enumerate(scenes)]
    return [
        Picture(scene, (pixels * 255).round().byte().permute(1, 2, 0).numpy())
        for scene, pixels in zip(scenes, drawn, strict=True)
    ]


def sample_pictures(count: int, seed: int = 0) -> list[Picture]:
    """``count`` clear scenes by the world's prior, the same for one ``seed``."""
    return pictures([prior_scene(random.Random(f"sample-{seed}-{n}"), fog=0.0) for n in range(count)], seed)
