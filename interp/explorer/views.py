"""What a click on a token asks: where every head looks from a query, who looks at a key, what an answer rests on.

Whole rows and columns of the pattern, exact, added up over cells of neighbouring tokens so that they fit a screen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.explorer.kept import KeptLayer
from headscope.interp.prompts.grids import ImageGrid
from headscope.interp.statistics.spans import Span

CELLS = 256  # along a text
TOP = 3  # tokens that are named a head
AT_ONCE = 1 << 24  # numbers held at a time


@dataclass(frozen=True, eq=False)
class Looks:
    """One token and every head: ``cells`` (layer's heads one after the other, cell) float32; ``top`` (head, TOP) token
    positions, heaviest first, -1 for none, and their weights ``mass``; ``width`` tokens a cell."""

    cells: NDArray[np.float32]
    top: NDArray[np.int64]
    mass: NDArray[np.float32]
    width: int


def cell_width(tokens: int) -> int:
    """Tokens a cell, so that a text has at most ``CELLS``."""
    return max(1, -(-tokens // CELLS))


def looks_from(layers: dict[int, KeptLayer], query: int) -> Looks:
    """Where each head looks from ``query``: the mass on each cell of keys."""
    return _looks([_row(kept, query) for kept in layers.values()], pool="sum")


def looks_at(layers: dict[int, KeptLayer], key: int) -> Looks:
    """Who looks at ``key``: the largest weight of each cell's queries."""
    return _looks([_column(kept, key) for kept in layers.values()], pool="max")


def _row(kept: KeptLayer, query: int) -> NDArray[np.float32]:
    _check(query, kept.queries)
    at = torch.tensor([query], device=kept.call.query.device)
    found: NDArray[np.float32] = kept.weights(at, slice(0, kept.keys))[:, 0].float().cpu().numpy()
    return found


def _column(kept: KeptLayer, key: int) -> NDArray[np.float32]:
    _check(key, kept.keys)
    rows = torch.arange(kept.queries, device=kept.call.query.device)
    each = kept.call.query.shape[-1] if kept.call.redistribution is None else kept.keys  # of a row of one head
    step = max(1, AT_ONCE // (kept.heads * each))
    parts = [kept.weights(part, slice(key, key + 1))[..., 0] for part in torch.split(rows, step)]
    found: NDArray[np.float32] = torch.cat(parts, 1).float().cpu().numpy()
    return found


def _check(position: int, count: int) -> None:
    if not 0 <= position < count:
        raise HeadscopeError(f"there is no token {position}; the text has tokens 0 to {count - 1}")


def _looks(found: list[NDArray[np.float32]], *, pool: str) -> Looks:
    values = np.concatenate(found)
    width = cell_width(values.shape[1])
    order = np.argsort(-values, axis=1, kind="stable")[:, :TOP]
    mass = np.take_along_axis(values, order, 1)
    return Looks(along(values, width, pool), np.where(mass > 0, order, -1), mass, width)


def along(values: NDArray[np.float32], width: int, pool: str = "sum") -> NDArray[np.float32]:
    """Values (row, token) by cells of ``width`` tokens."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % width)))
    cells = padded.reshape(len(values), -1, width)
    return np.asarray(cells.max(2) if pool == "max" else cells.sum(2), dtype=np.float32)


def answer(
    kept: KeptLayer, head: int, first: int, spans: list[list[Span]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The rows from ``first`` on of one head: by cells of keys (row, cell), and their mass on ``spans`` (row, span)."""
    rows = torch.arange(first, kept.queries, device=kept.call.query.device)
    width = cell_width(kept.keys)
    cells, masses = [], []
    for part in torch.split(rows, max(1, AT_ONCE // (8 * kept.keys))):
        weights = kept.weights(part, slice(0, kept.keys), head)[0].float().cpu().numpy()
        cells.append(along(weights, width))
        each = [sum((weights[:, a:b].sum(1) for a, b in span), np.zeros(len(weights), np.float32)) for span in spans]
        masses.append(np.stack(each, 1) if each else np.zeros((len(weights), 0), np.float32))
    return np.concatenate(cells), np.concatenate(masses).astype(np.float32)


def on_picture(kept: KeptLayer, head: int, query: int, grids: list[ImageGrid]) -> list[NDArray[np.float32]]:
    """The weights of ``query``'s row on each grid's tokens: (row, column) each."""
    row = _row(kept, query)[head]
    return [np.asarray(grid.of(row), dtype=np.float32) for grid in grids]
