"""What may stand in a scene, and how often: objects, their companions, weak evidence.

Made for studying hallucination on a small vision-language model, so the world holds what the field blames for it, each
with a dial: companions that come with an object nine times in ten and are tiny, faint, blurred or half hidden; smudges
that could be one; fog that leaves only the words. Nothing that is said of a scene is ever false.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from headscope.interp.models.available import IMAGE_SIZE, PATCH_SIZE

CLASSES = ("boat", "fish", "tree", "mushroom", "house", "car", "moon", "star", "flower", "sun", "ball", "heart")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
BACKGROUNDS = ("grass", "beach", "night", "snow")
SIZE, PATCH = IMAGE_SIZE, PATCH_SIZE
GRID = SIZE // PATCH  # image tokens of a side
SMUDGE = len(CLASSES)  # the class of a blurred spot that is no object
MOST = 12  # things of a scene, smudges included


@dataclass(frozen=True)
class Companion:
    """``name`` stands in a scene with probability ``beside`` where its object does, else with ``alone``."""

    name: str
    beside: float
    alone: float


# the last pair has no prior: a sun is as likely without a flower as with one
COMPANIONS = {
    "boat": Companion("fish", 0.95, 0.08),
    "tree": Companion("mushroom", 0.90, 0.08),
    "house": Companion("car", 0.80, 0.08),
    "moon": Companion("star", 0.60, 0.08),
    "flower": Companion("sun", 0.10, 0.10),
}
WEAK = frozenset(companion.name for companion in COMPANIONS.values())
POPULAR = ("ball", "heart", "fish", "mushroom")  # the most frequent of prior scenes


@dataclass(frozen=True)
class Thing:
    """One object, or a smudge: centre and radius in pixels, turn in radians, opacity in 0..1, its edge's width."""

    kind: int
    colour: int
    x: float
    y: float
    radius: float
    turn: float = 0.0
    opacity: float = 1.0
    softness: float = 1.0

    @property
    def name(self) -> str:
        """Its class."""
        return CLASSES[self.kind]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels, inside the image."""
        left, top = max(0.0, self.x - self.radius), max(0.0, self.y - self.radius)
        return left, top, min(float(SIZE), self.x + self.radius), min(float(SIZE), self.y + self.radius)

    @property
    def salience(self) -> float:
        """Radius times opacity: captions name the large and clear first."""
        return self.radius * self.opacity


@dataclass(frozen=True)
class Scene:
    """``things`` are drawn in order, a later one over an earlier one; ``fog`` in 0..1 hides all at 1."""

    things: tuple[Thing, ...]
    background: int
    fog: float = 0.0

    @property
    def objects(self) -> tuple[Thing, ...]:
        """The things that are no smudges."""
        return tuple(thing for thing in self.things if thing.kind != SMUDGE)

    @property
    def names(self) -> frozenset[str]:
        """The classes in it."""
        return frozenset(thing.name for thing in self.objects)

    def missing_companions(self) -> tuple[str, ...]:
        """Companions of its objects that it lacks."""
        return tuple(
            beside.name for name, beside in COMPANIONS.items() if name in self.names and beside.name not in self.names
        )


def balanced_scene(draw: random.Random, least: int = 2, most: int = 8) -> Scene:
    """Objects of any class, drawn one by one: no prior."""
    kinds = [draw.randrange(len(CLASSES)) for _ in range(draw.randint(least, most))]
    return _scene(draw, kinds, smudges=draw.choice((0, 0, 1)), fog=0.0)


def prior_scene(
    draw: random.Random,
    *,
    objects: Sequence[str] | None = None,
    companions: bool | None = None,
    fog: float | None = None,
) -> Scene:
    """A scene by the prior: one or two of the objects that have companions, these, and up to three others.

    Args:
        draw: the source of chance.
        objects: those with companions; chosen if not given.
        companions: all of them there (True), none (False), or as the prior has it.
        fog: drawn if not given: none in 7 of 10 scenes, else uniform in 0.3 to 1.
    """
    first = list(objects) if objects is not None else draw.sample(list(COMPANIONS), draw.choice((1, 1, 2)))
    names = list(first)
    for name, companion in COMPANIONS.items():
        likely = companion.beside if name in first else companion.alone
        there = draw.random() < likely if companions is None or name not in first else companions
        # with the companions of ``first`` decided by the caller, no other companion may stand in for a prior's
        if there and not (companions is not None and name not in first):
            names.append(companion.name)
    for _ in range(draw.choice((1, 2, 2, 3))):
        names.append(draw.choice(("ball", "heart")))
    if fog is None:
        fog = draw.uniform(0.3, 1.0) if draw.random() < 0.3 else 0.0
    return _scene(draw, [CLASSES.index(name) for name in names], smudges=draw.choice((0, 0, 1, 1, 2)), fog=fog)


def _scene(draw: random.Random, kinds: Sequence[int], smudges: int, fog: float) -> Scene:
    weak = [kind for kind in kinds if CLASSES[kind] in WEAK] + [SMUDGE] * smudges
    placed: list[Thing] = []
    for kind in [*(kind for kind in kinds if CLASSES[kind] not in WEAK), *weak]:
        placed.append(_placed(draw, kind, placed))
    hidden = [thing for thing in placed if _is_weak(thing) and draw.random() < 0.3]
    rest = [thing for thing in placed if thing not in hidden]
    return Scene((*(_behind(draw, thing, rest) for thing in hidden), *rest), draw.randrange(len(BACKGROUNDS)), fog)


def _is_weak(thing: Thing) -> bool:
    return thing.kind == SMUDGE or thing.name in WEAK


def _behind(draw: random.Random, thing: Thing, others: Sequence[Thing]) -> Thing:
    """The thing moved to the edge of a clear one, which is drawn over it: about half of it stays to be seen."""
    clear = [other for other in others if not _is_weak(other)]
    if not clear:
        return thing
    cover, angle = draw.choice(clear), draw.uniform(0, 2 * math.pi)
    x = _inside(cover.x + cover.radius * math.cos(angle), thing.radius)
    y = _inside(cover.y + cover.radius * math.sin(angle), thing.radius)
    return Thing(thing.kind, thing.colour, x, y, thing.radius, thing.turn, thing.opacity, thing.softness)


def _inside(value: float, radius: float) -> float:
    return min(max(value, radius), SIZE - radius)


def _placed(draw: random.Random, kind: int, others: Sequence[Thing]) -> Thing:
    """Of a few places the one furthest from other things, in shares of both radii: overlaps are rare, not none."""
    weak = kind == SMUDGE or CLASSES[kind] in WEAK
    radius = draw.uniform(5, 9) if weak else draw.uniform(9, 15)
    opacity = draw.uniform(0.08, 0.8) if weak else 1.0
    softness = draw.uniform(1, 4) if weak else 1.0
    if kind == SMUDGE:
        softness = radius
    best, apart = (0.0, 0.0), -1.0
    for _ in range(6):
        x, y = draw.uniform(radius, SIZE - radius), draw.uniform(radius, SIZE - radius)
        nearest = min((math.hypot(x - o.x, y - o.y) / (radius + o.radius) for o in others), default=math.inf)
        if nearest > apart:
            best, apart = (x, y), nearest
        if apart > 0.8:
            break
    return Thing(kind, draw.randrange(len(COLOURS)), *best, radius, draw.uniform(-0.2, 0.2), opacity, softness)
