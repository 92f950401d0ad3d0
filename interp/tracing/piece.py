"""What one attention call leaves to the record."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.attention.call import AttentionCall


@dataclass(eq=False)
class Piece:
    """What one attention call of ``shape`` (batch, heads, queries) leaves: query rows ``rows`` (n,; None: all) of those
    from position ``offset``, and values by kind and name.

    ``start`` and ``end`` (batch,) are the real positions, ``key_offset`` is the first key's; nothing else of the call's
    mask is kept, whose rule may hold tensors as long as the text. ``parts``: those of statistics of keys, by the
    statistic's first variable and name; ``places``: where a statistic of blocks begins.
    """

    layer: int
    shape: tuple[int, int, int]
    offset: int
    prompt: bool
    start: Tensor | None
    end: Tensor | None
    key_offset: int
    cross: bool
    rows: Tensor | None
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, call: AttentionCall, offset: int, rows: Tensor | None, *, prompt: bool) -> Piece:
        """The empty piece of a call."""
        mask, (batch, heads, queries, _) = call.mask, call.query.shape
        shape, real = (batch, heads, queries), (mask.start, mask.end)
        return cls(call.layer, shape, offset, prompt, *real, mask.key_offset, call.cross, rows)

    def positions(self) -> NDArray[np.int64]:
        """Where the rows stand."""
        rows = np.arange(self.shape[2]) if self.rows is None else self.rows.cpu().numpy()
        return rows + self.offset
