"""Concentric positions: an image's tokens are placed by rings, from its border to its centre."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.spans import by_example
from headscope.interventions.positions.documents import Documents
from headscope.interventions.positions.position_edit import BEHIND_WINDOWS, IN_PIECES, PositionEdit, require_causal


@dataclass(frozen=True, eq=False)
class ConcentricPositions(PositionEdit):
    """Concentric causal attention (CCA, Xing et al. 2024): image tokens by ring instead of row by row.

    In a grid of H rows and W columns ring(r, c) = min(r, c, H - 1 - r, W - 1 - c), 0 at the border. With i tokens
    before the image, token (r, c) stands at i + ring(r, c), and what comes after the image goes on at i + the number of
    rings (12 of LLaVA's 24 x 24). An image's token sees the image's tokens of its own ring and of those further out,
    and all before the image; text sees all before it.

    Their models are trained with it; on others it shows what positions alone change. What differs from the authors'
    code: any grid (an odd one has a ring more, its middle [OURS]), batches whose images stand in different places, and
    generated tokens go on after the text. The image's tokens must follow one another, one image an example, and be read
    in one pass. A row that comes before the image is as it was.

    Args:
        span: the image's tokens, row by row: (first, stop), one pair an example, or the name of a published span.
        grid: its rows and columns.
        strength: moves scores from the model's to these (see ``PositionEdit``).
    """

    _: KW_ONLY
    span: Any = "image"
    grid: Sequence[int] = (24, 24)

    source: ClassVar[str] = "Xing et al. 2024, arXiv 2410.15926; xing0047/cca-llava @ 8b5bb61"
    unit: ClassVar[str] = "share of the change of scores"
    nothing: ClassVar[str] = "no row that was meant is of an image, or after one"
    refused: ClassVar[dict[str, str]] = PositionEdit.refused | BEHIND_WINDOWS | IN_PIECES

    def __post_init__(self) -> None:
        grid = tuple(self.grid)
        if len(grid) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in grid):
            raise HeadscopeError(f"ConcentricPositions: grid must be (rows, columns), not {self.grid!r}")
        object.__setattr__(self, "grid", grid)
        if not isinstance(self.span, str):
            by_example(self.span)
        super().__post_init__()

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """Positions and visibility by ring."""
        rotation = self.rotation(call)
        image = Documents.of([_one(row) for row in by_example(self.span)], call, "an image's tokens")
        _check_size(image, self.grid)
        if not image.reached:
            return call
        require_causal(call, "CCA")
        image.require_whole("CCA")
        ring = rings(*self.grid).to(mine.device).flatten()
        first_row, first_key = call.mask.query_offset, call.mask.key_offset

        def place(count: int, offset: int) -> Tensor:
            """The new position of ``count`` columns from ``offset``: (batch, column)."""
            at = torch.arange(count, device=mine.device) + offset
            inside = at[None] - image.begin[:, None]
            held = ring[inside.clamp(0, len(ring) - 1)] + image.begin[:, None]
            moved = torch.where(at >= image.end[:, None], at - len(ring) + int(ring.max()) + 1, held)
            empty = (image.end == image.begin)[:, None]
            return torch.where((inside < 0) | empty, at, moved)

        rows, keys = place(call.query.shape[2], first_row), place(call.key.shape[2], first_key)
        after = torch.arange(call.query.shape[2], device=mine.device) + first_row >= image.begin[:, None]
        some = image.end > image.begin
        self.note(mine & (after & some[:, None])[:, None])
        in_rows, in_keys = image.of_rows >= 0, image.of_keys >= 0

        def shows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            row, key = q - first_row, k - first_key
            both = in_rows[b, row] & in_keys[b, key]
            return torch.where(both, keys[b, key] <= rows[b, row], k <= q)

        def turned(x: Tensor, places: Tensor, offset: int) -> Tensor:
            at = torch.arange(x.shape[2], device=x.device) + offset
            return rotation.turn(x, (rotation.angles(places) - rotation.angles(at))[:, None])

        query, key = turned(call.query, rows, first_row), turned(call.key, keys, first_key)
        ahead = len(ring) if bool(in_rows.any()) else 0
        return self.placed(call, mine, query, key, shows, ahead)


def rings(rows: int, columns: int) -> Tensor:
    """The ring of every cell of a grid, 0 at its border: (rows, columns)."""
    r, c = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    return torch.minimum(torch.minimum(r, rows - 1 - r), torch.minimum(c, columns - 1 - c))


def _one(row: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The span of one image, whose pieces follow one another.

    Raises:
        HeadscopeError: something stands between them.
    """
    if any(one[1] != after[0] for one, after in zip(row, row[1:], strict=False)):
        raise HeadscopeError(
            f"an image's tokens must follow one another, and {row} leaves tokens between them (several images, or "
            "marks between rows), for which CCA says no place: name the span of one image without such marks"
        )
    return [(row[0][0], row[-1][1])] if row else []


def _check_size(image: Documents, grid: Sequence[int]) -> None:
    sizes = set(image.length.flatten().tolist()) - {0, grid[0] * grid[1]}
    if sizes:
        raise HeadscopeError(
            f"a grid of {grid[0]} x {grid[1]} has {grid[0] * grid[1]} tokens, and the span {sizes.pop()}: give "
            "grid=(rows, columns)"
        )
