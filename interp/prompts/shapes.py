"""Pictures drawn here: plain coloured shapes on a plain ground, with the box of each. Data for any vision model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE, CELL = 120, 40  # pixels; one shape at most in each cell of 3 x 3
DESCRIBE = "Please describe the image in detail."  # of VHD (arXiv 2412.13949)
COLOURS = {"red": (214, 40, 40), "green": (44, 160, 60), "blue": (40, 80, 210), "yellow": (240, 200, 40)}
KINDS = ("square", "circle", "triangle")


@dataclass(frozen=True, eq=False)
class Drawn:
    """``pixels`` (height, width, 3) bytes, and ``boxes`` (left, top, right, bottom) of what is drawn, by name."""

    pixels: NDArray[np.uint8]
    boxes: dict[str, tuple[float, float, float, float]]


def shapes(count: int, seed: int = 0) -> list[Drawn]:
    """``count`` pictures of 120 x 120 pixels with one to three different shapes each, the same for one ``seed``."""
    return [_draw(np.random.default_rng([seed, i])) for i in range(count)]


def _draw(rng: np.random.Generator) -> Drawn:
    ground = rng.integers(190, 245, 3)
    found = np.clip(ground + rng.normal(0, 4, (SIDE, SIDE, 1)), 0, 255)  # (height, width, 3)
    boxes = {}
    names = [(colour, kind) for colour in COLOURS for kind in KINDS]
    picked = rng.permutation(len(names))[: rng.integers(1, 4)]
    for cell, at in zip(rng.permutation(9), picked, strict=False):
        (colour, kind), radius = names[at], int(rng.integers(11, 18))
        y, x = (int(CELL * c + CELL / 2 + rng.integers(radius - 19, 20 - radius)) for c in divmod(int(cell), 3))
        found[_inside(kind, x, y, radius)] = COLOURS[colour]
        boxes[f"{colour} {kind}"] = (float(x - radius), float(y - radius), float(x + radius), float(y + radius))
    return Drawn(found.astype(np.uint8), boxes)


def _inside(kind: str, x: int, y: int, radius: int) -> NDArray[np.bool_]:
    """Which pixels (row, column) a shape around (x, y) covers."""
    down, across = np.mgrid[:SIDE, :SIDE] + 0.5
    down, across = down - y, across - x
    if kind == "circle":
        return np.asarray(down**2 + across**2 <= radius**2)
    if kind == "square":
        return np.asarray(np.maximum(np.abs(down), np.abs(across)) <= radius)
    return np.asarray((down <= radius) & (np.abs(across) <= (down + radius) / 2))
