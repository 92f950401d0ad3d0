"""What one attention call leaves to the record."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.statistics import BLOCK, ROW, KeyStatistic, Statistic
from headscope.interp.tracing.host_copies import HostCopies, owned


@dataclass(frozen=True, eq=False)
class Where:
    """Where an attention call of ``shape`` (batch, heads, queries) stands: query rows ``rows`` (n,; None: all) of those
    from position ``offset``. One object for all calls of a pass that are alike in this.

    ``start`` and ``end`` (batch,) are the real positions, ``key_offset`` is the first key's; nothing else of the call's
    mask is kept, whose rule may hold tensors as long as the text.
    """

    shape: tuple[int, int, int]
    offset: int
    prompt: bool
    start: Tensor | None
    end: Tensor | None
    key_offset: int
    cross: bool
    rows: Tensor | None

    @classmethod
    def of(cls, call: AttentionCall, offset: int, rows: Tensor | None, *, prompt: bool) -> Where:
        """That of ``call``."""
        mask, (batch, heads, queries, _) = call.mask, call.query.shape
        shape, real = (batch, heads, queries), (mask.start, mask.end)
        return cls(shape, offset, prompt, *real, mask.key_offset, call.cross, rows)

    def positions(self) -> NDArray[np.int64]:
        """Where the rows stand."""
        rows = np.arange(self.shape[2]) if self.rows is None else self.rows.cpu().numpy()
        return rows + self.offset


@dataclass(eq=False, slots=True)
class Piece:
    """What one attention call leaves: values by kind and name.

    ``parts``: those of statistics of keys, by the statistic's first variable and name; ``places``: where a statistic of
    blocks begins. A token that is generated leaves one in every layer, and Python's collector looks at each dict and
    object that stays: there is none without need.
    """

    layer: int
    where: Where
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    parts: dict[str, dict[str, Tensor]] | None = None
    places: dict[str, tuple[int, int]] | None = None

    def keep(self, statistic: Statistic, values: dict[str, Tensor], copies: HostCopies) -> None:
        """Keep what a statistic made of the call: large values of rows and blocks in host memory, once ``copies`` are
        there, the others on the layer's device."""
        if isinstance(statistic, KeyStatistic):
            self.parts = self.parts or {}
            self.parts[statistic.recorded[0]] = {name: owned(value) for name, value in values.items()}
            return
        found = self.values.setdefault(statistic.kind, {})
        leaves = statistic.kind in (ROW, BLOCK)
        for name, value in values.items():
            kept = owned(value)
            found[statistic.named(name)] = copies.send(kept) if leaves else kept
