"""Where in a picture each of its tokens comes from: the grids that a processor made of it.

A picture becomes one grid of tokens (LLaVA, Qwen-VL's merged patches, Gemma 3, PaliGemma), or two: the whole in few
tokens and finer tiles of it (Idefics 3, SmolVLM, LLaVA-NeXT, LLaVA-OneVision). Sizes are read from what the processor
made; where they do not add up to the picture's tokens it is refused, never guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the picture as it was given
_TILE = re.compile(r"<row_(\d+)_col_(\d+)>")


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """A grid of one picture's tokens.

    Attributes:
        positions: (row, column) of tokens in the prompt, from the example's first.
        box: left, top, right, bottom of what the grid covers, in the picture's pixels: a crop lies inside the picture,
            padding reaches beyond it.
        size: width and height of the picture in pixels.
        image: which picture of the chat.
        view: "whole", or "tiles" for a picture's second, finer grid.
    """

    positions: NDArray[np.int64]
    box: Box
    size: tuple[int, int]
    image: int = 0
    view: str = "whole"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.positions.shape
        return rows, columns

    @cached_property
    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where columns and rows begin and end, in pixels: (column + 1,), (row + 1,)."""
        left, top, right, bottom = self.box
        rows, columns = self.shape
        return np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)

    def covered(self, box: Sequence[float]) -> NDArray[np.float64]:
        """The share of each cell's area that lies in ``box`` (pixels): (row, column)."""
        across, down = self.edges
        left, top, right, bottom = box
        x = np.clip(np.minimum(across[1:], right) - np.maximum(across[:-1], left), 0, None) / np.diff(across)
        y = np.clip(np.minimum(down[1:], bottom) - np.maximum(down[:-1], top), 0, None) / np.diff(down)
        return np.asarray(y[:, None] * x[None])

    @property
    def real(self) -> NDArray[np.float64]:
        """The share of each cell that is picture and not padding: (row, column)."""
        return self.covered((0.0, 0.0, *map(float, self.size)))

    @property
    def rings(self) -> NDArray[np.int64]:
        """How far each cell lies from the border, 0 at it (arXiv 2410.15926): (row, column)."""
        r, c = np.indices(self.shape)
        rows, columns = self.shape
        return np.asarray(np.minimum.reduce([r, c, rows - 1 - r, columns - 1 - c]))

    def of(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of a prompt's keys (..., key) as (..., row, column)."""
        return np.asarray(values[..., self.positions])


@dataclass(frozen=True)
class Made:
    """What one picture became: the intervals of its tokens, the text before each, the size that the model sees, the
    merged grid where the processor says it, and its size in pixels."""

    spans: Sequence[tuple[int, int]]
    before: Sequence[str]
    seen: tuple[int, int] | None  # height, width of the pixel values
    merged: tuple[int, int, int] | None  # time, height, width of the merged grid
    size: tuple[int, int]  # width, height
    image: int


def grids_of(made: Made, config: Any, processor: Any) -> list[ImageGrid]:
    """The grids of one picture, the whole first.

    Raises:
        HeadscopeError: its tokens are no grid that is known.
    """
    tokens = np.concatenate([np.arange(*span) for span in made.spans])
    if made.merged is not None:
        time, rows, columns = made.merged
        if time != 1 or rows * columns != len(tokens):
            raise _no_grid(made, len(tokens), f"{time} x {rows} x {columns} merged patches")
        return [_whole(made, tokens.reshape(rows, columns))]
    if len(made.spans) > 1:
        return _tiled(made)
    assert made.seen is not None
    rows, columns = _patches(config, made.seen)
    pooled = math.isqrt(max(1, rows * columns // len(tokens)))
    if rows * columns == len(tokens) * pooled**2 and not rows % pooled and not columns % pooled:
        box = _seen_part(processor.image_processor, made.size)
        return [_whole(made, tokens.reshape(rows // pooled, columns // pooled), box)]
    if hasattr(processor, "_get_unpadded_features") and len(tokens) > rows * columns:
        return _finer(made, tokens, rows, columns, processor)
    raise _no_grid(made, len(tokens), f"{rows} x {columns} patches")


def _no_grid(made: Made, tokens: int, of: str) -> HeadscopeError:
    return HeadscopeError(
        f"the {tokens} tokens of picture {made.image} are no grid of {of}, so nothing can be placed on the picture; "
        "read span statistics of the published span 'image' instead"
    )


def _whole(made: Made, positions: NDArray[np.int64], box: Box | None = None) -> ImageGrid:
    width, height = made.size
    return ImageGrid(positions, box or (0.0, 0.0, float(width), float(height)), made.size, made.image)


def _patches(config: Any, seen: tuple[int, int]) -> tuple[int, int]:
    size = getattr(config.vision_config, "patch_size", None)
    if size is None:
        raise HeadscopeError(f"{config.model_type} does not say its patch size, so its image tokens have no place")
    high, wide = (size, size) if isinstance(size, int) else size
    return seen[0] // high, seen[1] // wide


def _seen_part(settings: Any, size: tuple[int, int]) -> Box:
    """The part of the picture that the model sees after resizing, padding and cropping, to a pixel's rounding."""
    width, height = map(float, size)
    if getattr(settings, "do_pad", False) and hasattr(settings, "pad_to_square"):
        side = max(width, height)
        x, y = (width - side) / 2, (height - side) / 2
        return x, y, x + side, y + side
    if not getattr(settings, "do_center_crop", False):
        return 0.0, 0.0, width, height
    wanted, crop = dict(settings.size), dict(settings.crop_size)
    scale = (1.0, 1.0)
    if getattr(settings, "do_resize", True):
        short = wanted.get("shortest_edge")
        scale = (wanted["width"] / width, wanted["height"] / height) if short is None else (short / min(size),) * 2
    wide, high = crop["width"] / scale[0], crop["height"] / scale[1]
    x, y = (width - wide) / 2, (height - high) / 2
    return x, y, x + wide, y + high


def _tiled(made: Made) -> list[ImageGrid]:
    """Idefics 3 and its like: tiles named by row and column, and the whole picture last."""
    counts = {stop - first for first, stop in made.spans}
    side = math.isqrt(next(iter(counts)))
    named = [found[-1] if (found := _TILE.findall(text)) else None for text in made.before]
    places = {(int(one[0]), int(one[1])): span for one, span in zip(named, made.spans, strict=True) if one is not None}
    whole = [span for one, span in zip(named, made.spans, strict=True) if one is None]
    rows, columns = (max((place[axis] for place in places), default=0) for axis in (0, 1))
    if len(counts) > 1 or side**2 not in counts or len(whole) != 1 or len(places) != rows * columns:
        raise _no_grid(made, sum(b - a for a, b in made.spans), "tiles that the prompt names by row and column")
    tiles = [[np.arange(*places[r + 1, c + 1]).reshape(side, side) for c in range(columns)] for r in range(rows)]
    fine = _whole(made, np.block(tiles))
    return [
        _whole(made, np.arange(*whole[0]).reshape(side, side)),
        ImageGrid(fine.positions, fine.box, fine.size, fine.image, "tiles"),
    ]


def _finer(made: Made, tokens: NDArray[np.int64], rows: int, columns: int, processor: Any) -> list[ImageGrid]:
    """LLaVA-NeXT and LLaVA-OneVision: the whole picture, then its tiles row by row, a newline token after each."""
    from transformers.image_processing_utils import select_best_resolution

    assert made.seen is not None
    base, rest = rows * columns, len(tokens) - rows * columns
    width, height = made.size
    whole = _whole(made, tokens[:base].reshape(rows, columns))
    if rest == 1:  # a newline alone: one of several pictures, which is not tiled
        return [whole]
    best = select_best_resolution([height, width], processor.image_processor.image_grid_pinpoints)
    tiles = best[0] // made.seen[0], best[1] // made.seen[1]
    inside, lines = processor._get_unpadded_features(height, width, rows, columns, *tiles)
    if inside % lines or inside + lines != rest:
        raise _no_grid(made, len(tokens), f"{rows} x {columns} patches and {inside} finer ones in {lines} lines")
    fine = tokens[base:].reshape(lines, -1)[:, :-1]
    box = _unpadded((rows * tiles[0], columns * tiles[1]), made.size)
    return [whole, ImageGrid(fine, box, whole.size, whole.image, "tiles")]


def _unpadded(canvas: tuple[int, int], size: tuple[int, int]) -> Box:
    """What is left of a canvas of cells (rows, columns), into which the picture was fitted and padded on two sides,
    when rows or columns of padding are taken away: as many whole ones as stand on both sides."""
    width, height = size
    rows, columns = canvas
    if width / height > columns / rows:
        pixels = width / columns  # of the picture a cell
        rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
    else:
        pixels = height / rows
        columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
    x, y = (width - columns * pixels) / 2, (height - rows * pixels) / 2
    return x, y, width - x, height - y
