"""Decay beyond a window: keys far from the query count less, by a constant factor on their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.spans import OPEN
from headscope.interventions.attention.score_edit import SpanEdit, number


@dataclass(frozen=True, eq=False)
class DecayBeyondWindow(SpanEdit):
    """Multiply the scores of keys further than ``window`` tokens from the query by ``factor``: UltraViCo.

    Z' = Z where |q - k| <= window or Z < 0, else factor Z (Zhao et al. 2025). Made for video transformers that read
    more frames than they were trained on (window: half the trained tokens, 1560 * 21 / 2 in Wan2.1); it is defined on
    any scores. Distances are of flattened tokens, as in the authors' kernels, not of frames.

    A factor on signed scores is no share of weight: with ``positive_only`` (theirs) scores of 0 or less stay, so that
    far keys with large scores lose most; without it negative ones rise. In a text no longer than the window nothing is
    scaled.

    What differs from the authors' code: theirs quantises queries and keys to 8 bits. Its rule for Wan's first frame,
    which does not see keys beyond the trained length, is ``KnockOut(span=(21 * 1560 + 1, OPEN), positions=(0, 1561))``,
    its entropy factor f ``HeadTemperature(temperature=1 / f)``. Their README says alpha < beta, the code has it the
    other way round.

    Args:
        span: only keys of it (by default all; theirs for HunyuanVideo are video tokens, with ``positions`` the same).
        window: distance up to which scores stay.
        factor: alpha.
        bands: (lowest, highest, factor) of distances, both ends included, that have factors of their own wherever they
            lie; theirs: harmonics of the trained length, beta 0.6.
        positive_only: leave scores below 0 as they are.
        strength: moves all factors from 1.
    """

    _: KW_ONLY
    span: Any = (0, OPEN)
    window: int = 16380
    factor: float = 0.9
    bands: Sequence[tuple[int, int, float]] = ()
    positive_only: bool = True

    source: ClassVar[str] = "Zhao et al. 2025, arXiv 2511.20123"
    unit: ClassVar[str] = "factor on scores"
    nothing: ClassVar[str] = "no query that is meant sees a key of its span beyond the window or in a band"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 0:
            raise HeadscopeError(f"DecayBeyondWindow: window must be tokens, 0 or more, not {self.window!r}")
        number("DecayBeyondWindow", "factor", self.factor)
        for band in self.bands:
            if len(band) != 3 or not 0 <= band[0] <= band[1]:
                raise HeadscopeError(f"DecayBeyondWindow: a band is (lowest, highest, factor), not {band!r}")
            number("DecayBeyondWindow", "a band's factor", band[2])

    @property
    def neutral(self) -> bool:
        """All factors are 1."""
        return super().neutral or self.factor == 1 and all(band[2] == 1 for band in self.bands)

    def change_keys(self, call: AttentionCall, mine: Tensor, keys: Tensor) -> AttentionCall:
        """The factors on the scores of far keys."""
        if call.cross:
            raise HeadscopeError("cross-attention has no distance between a query and a key; edit self-attention")

        edges = [self.window, *(band[1] for band in self.bands)]
        reach = min(max(edges) + 1, max(self._farthest(call)))
        apart = torch.arange(-reach, reach + 1, device=mine.device).abs()
        added = call.either(apart > self.window, self._added(self.factor), 0.0)
        for lowest, highest, own in self.bands:
            added = call.either((apart >= lowest) & (apart <= highest), self._added(own), added)
        table: dict[str, Any] = {"distances": added[None, None], "first_distance": -reach}
        return self.add(call, mine, "positive" if self.positive_only else "score", keys=keys[:, None], **table)

    def meets(self, call: AttentionCall, mine: Tensor, keys: Tensor) -> Tensor:
        """Whether the call also is long enough for a distance that is scaled."""
        mask = call.mask
        behind, ahead = self._farthest(call)
        ahead = ahead if mask.right is None else min(ahead, mask.right)
        behind = behind if mask.left is None else min(behind, mask.left)
        least = min([self.window + 1, *(band[0] for band in self.bands)])
        return super().meets(call, mine, keys) & (max(ahead, behind) >= least)

    def _farthest(self, call: AttentionCall) -> tuple[int, int]:
        """How far the first key lies behind the last query, and the last key ahead of the first query."""
        query, key = call.mask.query_offset, call.mask.key_offset
        return query + call.query.shape[2] - 1 - key, key + call.key.shape[2] - 1 - query

    def _added(self, factor: float) -> float:
        return self.strength * (factor - 1)
