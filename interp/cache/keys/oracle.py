"""The oracle: the best keys for a budget, by what later queries will look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from headscope.interp.cache.policy import ONE_SEQUENCE, KeyPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError


@dataclass(frozen=True, kw_only=True)
class Oracle(KeyPolicy):
    """The mass that the measured rows themselves put on a key, summed: the keys that lose least mass at a budget.

    No set of as many keys, chosen once for those rows, holds more of their mass. It is no method, as it looks at what
    is to be predicted, but the ceiling for all that choose once; ``top_k`` is the ceiling of those that choose anew for
    every query. It is the best for mass; another set may have a smaller error of the output.

    Args:
        per: ``"kv_head"``: one set for the query heads that share a key head, as a cache has it (the best for their
            mean); ``"head"``: one for every query head.
    """

    name: ClassVar[str] = "oracle"
    unit: ClassVar[str] = "mass, summed over the measured queries"
    source: ClassVar[str] = "headscope's own"
    needs: ClassVar[tuple[str, ...]] = ("measured",)
    refused = {**ONE_SEQUENCE, "edits": "the rows that it looks at are still to come"}

    per: Literal["kv_head", "head"] = "kv_head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per not in ("kv_head", "head"):
            raise HeadscopeError(f"{self.name}: per must be 'kv_head' or 'head', not {self.per!r}")

    def scores(self, reading: Reading) -> Tensor:
        if reading.measured is None:
            raise HeadscopeError(f"{self.name} looks at the rows that are measured, and was given none")
        first, stop = (torch.full_like(reading.stop, n) for n in reading.measured)
        mass = reading.received(first, stop)
        return mass if self.per == "head" else reading.by_group(mass)
