"""The twelve objects as signed distances: negative inside, in units of the radius, y pointing down."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

Point = tuple[float, float]


def circle(x: Tensor, y: Tensor, at: Point, radius: float) -> Tensor:
    """Distance to a circle."""
    return ((x - at[0]) ** 2 + (y - at[1]) ** 2).sqrt() - radius


def box(x: Tensor, y: Tensor, at: Point, half: Point) -> Tensor:
    """The larger of the distances to an upright rectangle's sides."""
    return torch.maximum((x - at[0]).abs() - half[0], (y - at[1]).abs() - half[1])


def polygon(x: Tensor, y: Tensor, corners: Sequence[Point]) -> Tensor:
    """The largest of the distances to a convex polygon's sides."""
    centre = (sum(c[0] for c in corners) / len(corners), sum(c[1] for c in corners) / len(corners))
    sides = []
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        length = math.hypot(x1 - x0, y1 - y0)
        normal = ((y1 - y0) / length, (x0 - x1) / length)
        if normal[0] * (centre[0] - x0) + normal[1] * (centre[1] - y0) > 0:
            normal = (-normal[0], -normal[1])
        sides.append(normal[0] * (x - x0) + normal[1] * (y - y0))
    return reduce(torch.maximum, sides)


def either(*distances: Tensor) -> Tensor:
    """The union."""
    return reduce(torch.minimum, distances)


# what a shape is: the coloured part, a detail (or none) and the detail's grey
Shape = tuple[Tensor, Tensor | None, float]


def _boat(x: Tensor, y: Tensor) -> Shape:
    hull = polygon(x, y, [(-1, 0.2), (1, 0.2), (0.6, 0.85), (-0.6, 0.85)])
    return (
        either(hull, polygon(x, y, [(0, -1), (0, 0.05), (0.8, 0.05)]), box(x, y, (-0.06, -0.35), (0.06, 0.65))),
        None,
        0,
    )


def _fish(x: Tensor, y: Tensor) -> Shape:
    body = ((((x + 0.2) / 0.75) ** 2 + (y / 0.5) ** 2).sqrt() - 1) * 0.5
    return either(body, polygon(x, y, [(0.35, 0), (1, -0.55), (1, 0.55)])), circle(x, y, (-0.55, -0.1), 0.12), 0.1


def _tree(x: Tensor, y: Tensor) -> Shape:
    return polygon(x, y, [(0, -1), (0.8, 0.45), (-0.8, 0.45)]), box(x, y, (0, 0.72), (0.18, 0.28)), 0.35


def _mushroom(x: Tensor, y: Tensor) -> Shape:
    return torch.maximum(circle(x, y, (0, 0.05), 0.9), y - 0.05), box(x, y, (0, 0.5), (0.27, 0.45)), 0.85


def _house(x: Tensor, y: Tensor) -> Shape:
    walls = box(x, y, (0, 0.4), (0.65, 0.5))
    return (
        either(walls, polygon(x, y, [(0, -0.95), (0.95, -0.1), (-0.95, -0.1)])),
        box(x, y, (0, 0.6), (0.17, 0.3)),
        0.15,
    )


def _car(x: Tensor, y: Tensor) -> Shape:
    wheels = either(circle(x, y, (-0.5, 0.5), 0.26), circle(x, y, (0.5, 0.5), 0.26))
    return either(box(x, y, (0, 0.15), (1, 0.3)), box(x, y, (-0.05, -0.3), (0.5, 0.3))), wheels, 0.1


def _moon(x: Tensor, y: Tensor) -> Shape:
    return torch.maximum(circle(x, y, (0, 0), 0.95), -circle(x, y, (0.5, -0.1), 0.75)), None, 0


def _polar(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.atan2(x, -y), (x * x + y * y).sqrt()


def _star(x: Tensor, y: Tensor) -> Shape:
    angle, radius = _polar(x, y)
    between = ((angle / (2 * math.pi / 5) + 0.5) % 1 - 0.5).abs() * 2
    return (radius - (0.4 + 0.62 * (1 - between) ** 1.5)) * 0.6, None, 0


def _flower(x: Tensor, y: Tensor) -> Shape:
    angle, radius = _polar(x, y)
    return (radius - (0.68 + 0.3 * torch.cos(5 * angle))) * 0.6, circle(x, y, (0, 0), 0.25), 0.6


def _sun(x: Tensor, y: Tensor) -> Shape:
    angle, radius = _polar(x, y)
    rays = torch.maximum((radius - 1) * 0.8, -(torch.cos(8 * angle) - 0.3) * 0.2)
    return either(circle(x, y, (0, 0), 0.55), rays), None, 0


def _ball(x: Tensor, y: Tensor) -> Shape:
    whole = circle(x, y, (0, 0), 0.9)
    return whole, torch.maximum(y.abs() - 0.1, whole), 0.2


def _heart(x: Tensor, y: Tensor) -> Shape:
    lobes = either(circle(x, y, (-0.43, -0.35), 0.48), circle(x, y, (0.43, -0.35), 0.48))
    return either(lobes, polygon(x, y, [(-0.86, -0.15), (0.86, -0.15), (0, 0.95)])), None, 0


def _smudge(x: Tensor, y: Tensor) -> Shape:
    return circle(x, y * 1.2, (0, 0), 0.75), None, 0


# in the order of world.CLASSES, and the smudge
SHAPES: tuple[Callable[[Tensor, Tensor], Shape], ...] = (
    _boat, _fish, _tree, _mushroom, _house, _car, _moon, _star, _flower, _sun, _ball, _heart, _smudge,
)  # fmt: skip
