"""Scenes as pixels, drawn in torch on any device, a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, one_hot

from headscope.interp.prompts.scenes.shapes import SHAPES
from headscope.interp.prompts.scenes.world import COLOURS, MOST, PATCH, SIZE, SMUDGE, Scene, Thing

RGB = (
    (220, 40, 40), (40, 170, 60), (40, 80, 220), (240, 220, 40), (150, 50, 190), (245, 140, 30), (245, 245, 245),
    (30, 30, 30),
)  # fmt: skip
SKY = ((150, 200, 245), (120, 190, 240), (15, 20, 60), (190, 205, 220))
GROUND = ((90, 160, 70), (225, 200, 140), (40, 40, 55), (235, 240, 245))
HALF = 20  # pixels from a thing's centre to the side of the window that it is drawn in
FAR = 1e3  # a distance that covers nothing
COVERED = 0.12  # share of a patch from which on it is labelled


@dataclass(frozen=True)
class Drawn:
    """``pixels`` (scene, 3, height, width) in 0..1, whole steps of 1/255; ``kinds``, ``colours`` (scene, height, width)
    of the object over a pixel, -1 elsewhere; smudges, and what is fainter than 0.25, are left out."""

    pixels: Tensor
    kinds: Tensor
    colours: Tensor

    def patches(self, labels: Tensor, count: int) -> Tensor:
        """(scene, patch) the label that covers most of each patch, -1 where none covers ``COVERED`` of it."""
        planes = one_hot(labels + 1, count + 1)[..., 1:].permute(0, 3, 1, 2).float()
        share, label = avg_pool2d(planes, PATCH).max(1)
        return torch.where(share > COVERED, label, -1).flatten(1)


def arrays(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """(scene, thing, 8) every thing's fields, kind -1 where there is none; backgrounds; fog."""
    empty = [-1.0] + [0.0] * 7
    rows = [[_numbers(thing) for thing in scene.things] for scene in scenes]
    things = torch.tensor([row + [empty] * (MOST - len(row)) for row in rows])
    return things, torch.tensor([s.background for s in scenes]), torch.tensor([s.fog for s in scenes])


def _numbers(thing: Thing) -> list[float]:
    place = [thing.x, thing.y, thing.radius, thing.turn, thing.opacity, thing.softness]
    return [float(thing.kind), float(thing.colour), *place]


def draw(scenes: Sequence[Scene], seed: int, device: torch.device | str = "cpu") -> Drawn:
    """Draw scenes; noise, hills and shades come from ``seed`` (of the device's own generator)."""
    things, background, fog = (t.to(device) for t in arrays(scenes))
    chance = torch.Generator(device).manual_seed(seed)
    return render(things, background, fog, chance)


def render(things: Tensor, background: Tensor, fog: Tensor, chance: torch.Generator) -> Drawn:
    """As ``draw``, of what ``arrays`` gives."""
    # a margin, so that every thing's window is inside
    canvas = torch.nn.functional.pad(_landscape(background, chance), [HALF] * 4)
    labels = torch.full((2, len(things), *canvas.shape[-2:]), -1, device=things.device)
    rows, slots = (things[..., 0] >= 0).nonzero(as_tuple=True)
    sheets = _Sheets.cut(things[rows, slots], chance)
    for slot in range(things.shape[1]):
        chosen = (slots == slot).nonzero()[:, 0]
        sheets.put(canvas, labels, rows[chosen], chosen)
    inner = slice(HALF, HALF + SIZE)
    return Drawn(_fogged(canvas[..., inner, inner], fog, chance), *labels[..., inner, inner])


def _random(chance: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=chance, device=chance.device)


def _landscape(background: Tensor, chance: torch.Generator) -> Tensor:
    """(scene, 3, height, width): sky over ground with a wavy horizon, uneven light, grain."""
    count, device = len(background), background.device
    sky, ground = (torch.tensor(c, device=device)[background].float()[:, :, None, None] / 255 for c in (SKY, GROUND))
    line = torch.arange(SIZE, device=device).float() / SIZE
    down, across = line[:, None], line[None]
    high, wave, pace, start = (_random(chance, count, 1, 1) for _ in range(4))
    horizon = 0.35 + 0.3 * high + 0.06 * wave * torch.sin(across * (4 + 10 * pace) + 6.28 * start)
    below = ((down - horizon) * SIZE / 2 + 0.5).clamp(0, 1)[:, None]
    light = interpolate(_random(chance, count, 1, 8, 8) - 0.5, size=(SIZE, SIZE), mode="bilinear")
    image = sky * (1 - below) + ground * below + 0.1 * (_random(chance, count, 3, 1, 1) - 0.5)
    return image + 0.14 * light + 0.08 * (_random(chance, count, 1, SIZE, SIZE) - 0.5)


@dataclass(frozen=True)
class _Sheets:
    """Every thing of a batch in a window of its own, ready to be laid over its image: (thing, ...) each."""

    lines: Tensor  # (thing, line, 1) and (thing, 1, column): where the window is on the canvas
    columns: Tensor
    paint: Tensor  # (thing, 3, line, column), and how much of what is below it stays, outline and opacity included
    stays: Tensor
    solid: Tensor  # (thing, line, column): labelled
    labels: Tensor  # (2, thing): kind and colour

    @classmethod
    def cut(cls, things: Tensor, chance: torch.Generator) -> _Sheets:
        """(thing, 8) things as windows."""
        device = things.device
        kind, colour = things[:, 0].long(), things[:, 1].long()
        x, y, radius, turn, opacity, softness = (c[:, None, None] for c in things[:, 2:].unbind(1))
        offset = torch.arange(-HALF, HALF, device=device)
        columns, lines = x.floor().long() + offset + HALF, y.floor().long() + offset[:, None] + HALF
        distance, detail, grey = _shaped(
            kind, *_turned((columns - HALF + 0.5 - x) / radius, (lines - HALF + 0.5 - y) / radius, turn)
        )
        distance, detail = distance * radius, detail * radius
        shade = 0.08 * (_random(chance, len(things), 3) - 0.5)
        paint = (torch.tensor(RGB, device=device)[colour].float() / 255 + shade)[:, :, None, None]
        cover, part = _soft(distance, softness)[:, None], _soft(detail, softness)[:, None]
        outline = ((1.3 - (distance + 0.2).abs()).clamp(0, 1) / softness * (kind != SMUDGE)[:, None, None])[:, None]
        edge = torch.where(colour == COLOURS.index("black"), 0.75, 0.08)[:, None, None, None]
        # laid one over the other: the coloured part, the detail, the outline
        mixed = (paint * cover * (1 - part) + grey[:, None, None, None] * part) * (1 - outline) + edge * outline
        stays = (1 - cover) * (1 - part) * (1 - outline)
        seen = (torch.minimum(distance, detail) < 0.3) & ((kind != SMUDGE)[:, None, None]) & (opacity >= 0.25)
        strength = opacity[:, None]
        return cls(lines, columns, mixed * strength, 1 - strength * (1 - stays), seen, torch.stack([kind, colour]))

    def put(self, canvas: Tensor, labels: Tensor, rows: Tensor, chosen: Tensor) -> None:
        """Lay the ``chosen`` things over the canvases ``rows``, at most one each."""
        lines, columns = self.lines[chosen], self.columns[chosen]
        spot = (rows[:, None, None], slice(None), lines, columns)  # (thing, line, column, 3)
        canvas[spot] = canvas[spot] * self.stays[chosen].permute(0, 2, 3, 1) + self.paint[chosen].permute(0, 2, 3, 1)
        for plane, label in zip(labels, self.labels[:, chosen], strict=True):
            here = (rows[:, None, None], lines, columns)
            plane[here] = torch.where(self.solid[chosen], label[:, None, None], plane[here])


def _turned(across: Tensor, down: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = turn.cos(), turn.sin()
    return cos * across + sin * down, cos * down - sin * across


def _shaped(kind: Tensor, across: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(thing, line, column) distances to the coloured part and to the detail, (thing,) the detail's grey."""
    distance, detail = torch.empty_like(across), torch.full_like(across, FAR)
    grey = torch.zeros(len(kind), device=kind.device)
    for number, shape in enumerate(SHAPES):
        chosen = (kind == number).nonzero()[:, 0]
        distance[chosen], own, grey[chosen] = shape(across[chosen], down[chosen])
        if own is not None:
            detail[chosen] = own
    return distance, detail, grey


def _soft(distance: Tensor, softness: Tensor) -> Tensor:
    """How much of a pixel is covered at a distance in pixels, the edge ``softness`` wide."""
    return (0.5 - distance / softness).clamp(0, 1)


def _fogged(image: Tensor, fog: Tensor, chance: torch.Generator) -> Tensor:
    count = len(image)
    veil = 0.55 + 0.3 * (interpolate(_random(chance, count, 1, 6, 6), size=(SIZE, SIZE), mode="bilinear") - 0.5)
    veil = veil + 0.1 * (_random(chance, count, 1, SIZE, SIZE) - 0.5)
    share = fog[:, None, None, None].to(image.dtype)
    return ((image * (1 - share) + veil * share).clamp(0, 1) * 255).round() / 255
