"""MInference's vertical-slash pattern: columns and diagonals that the last queries look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.blocks import heaviest
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import ONE_SEQUENCE, RowPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError
from headscope.kernels.kept import Keep
from headscope.kernels.streaming.weights import Tile

LEAST = 30, 50  # columns and distances, whatever the settings, as in the authors' code


@dataclass(frozen=True, kw_only=True)
class VerticalSlash(RowPolicy):
    """Every query sees the columns and the distances that the prompt's last ``window`` queries give most mass.

    MInference's estimate (Jiang et al. 2024, arXiv 2407.02490; ``minference_forward.py:129-227, 296-486`` @ fb56c917):
    of the last 64 rows' pattern, the sum of each column, the first 30 keys forced, and of each distance q - k, the
    nearest 100 forced; the best ``vertical`` columns and ``slash`` distances, at least 30 and 50. Key k is seen if its
    column or its distance is chosen.

    What differs: their kernel computes distances in blocks of 64 x 64, which shows more than this; here the pattern is
    what was chosen. Without ``vertical`` and ``slash``, half of the budget goes to each [OURS].

    Args:
        window: last queries of the prompt that are read.
        vertical: columns (the authors' runtime default is 1,000); the budget then has no effect on them.
        slash: distances (6,096), likewise.
        first: first keys that are always chosen.
        near: nearest distances that are always chosen (30 in the authors' search).
    """

    name: ClassVar[str] = "vertical_slash"
    unit: ClassVar[str] = "mass, summed over queries"
    source: ClassVar[str] = "Jiang et al. 2024, arXiv 2407.02490; microsoft/MInference @ fb56c917"
    refused = {**ONE_SEQUENCE, "edits": "columns and distances are found anew in every head"}

    window: int = 64
    vertical: int | None = None
    slash: int | None = None
    first: int = 30
    near: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = [self.window, *(x for x in (self.vertical, self.slash) if x is not None)]
        if min(sizes) < 1 or self.first < 0 or self.near < 0:
            raise HeadscopeError(f"{self.name}: window, vertical and slash must be 1 or more, first and near 0 or more")

    def rule(self, reading: Reading, budget: Budget) -> Keep:
        half = budget.count(reading.count) // 2
        columns = reading.received_in_prompt(self.window).masked_fill(~reading.keys[:, None], -torch.inf)
        columns = columns.masked_fill((reading.keys & (reading.at < self.first))[:, None], torch.inf)
        many = half if self.vertical is None else torch.full_like(half, self.vertical)
        vertical = heaviest(columns, many.clamp(min=LEAST[0]))
        distances = self._distances(reading)
        gaps = torch.arange(distances.shape[-1], device=half.device)
        distances = distances.masked_fill(gaps < self.near, torch.inf)
        distances = distances.masked_fill((gaps >= reading.count[:, None])[:, None], -torch.inf)
        many = half if self.slash is None else torch.full_like(half, self.slash)
        slash = heaviest(distances, many.clamp(min=LEAST[1]))

        def shown(tile: Tile) -> Tensor:
            query = torch.arange(tile.rows.start, tile.rows.stop, device=half.device)[:, None]
            key = torch.arange(tile.keys.start, tile.keys.stop, device=half.device)[None, :]
            gap = (query - key).clamp(0, slash.shape[-1] - 1)
            return vertical[:, :, None, tile.keys] | (slash[:, :, gap] & (query >= key))

        return shown

    def _distances(self, reading: Reading) -> Tensor:
        """Mass that the prompt's last queries give to keys at each distance: (batch, head, distance)."""
        call = reading.call
        found = torch.zeros(*call.query.shape[:2], call.key.shape[2], device=call.query.device)
        for b, (start, stop) in enumerate(zip(reading.start.tolist(), reading.stop.tolist(), strict=True)):
            rows = slice(max(start, stop - self.window), stop)
            p = call.pattern(rows)[b]
            gap = torch.arange(rows.start, stop)[:, None] - torch.arange(p.shape[-1])[None, :]
            place = gap.clamp(min=0).to(p.device).flatten().expand(p.shape[0], -1)
            found[b].scatter_add_(1, place, p.flatten(1).to(found.dtype))
        return found
