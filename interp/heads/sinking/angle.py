"""Why a sink's logit is high: its angle to the queries, or its length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored, by_head
from headscope.interp.heads.texts import TextMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import LogitParts, Statistic

PARTS = ("angle", "norm")


@dataclass(frozen=True, kw_only=True)
class SinkAngle(TextMethod):
    """Score heads by how far the sink's logit lies above other keys' through its angle to the queries, in nats.

    Gu et al. 2024 (arXiv 2410.10781) write a logit as |q| |k| cos(q, k) and find that the first key is short and its
    cosine large: the sink comes of the angle. They show cosines and norms; there is no code. [OURS]: the difference of
    logits, averaged over a query's other visible keys and over queries, is split into what angles and what lengths make
    of it, in equal halves where they act together (``LogitParts``): the two parts sum to the difference exactly, and
    the means of both over all heads are in ``provenance["gap_nats"]``. There is no ratio of the two: they often have
    opposite signs.

    What it does not show: how much mass the sink gets (a logit counts relative to the largest, not to the mean), or
    where the angle comes from.

    Args:
        key: the position of the sink.
        part: "angle", or "norm" for what the sink's length does (negative where its key is short).
    """

    name: ClassVar[str] = "sink_angle"
    unit: ClassVar[str] = "nats"
    source: ClassVar[str] = "arXiv 2410.10781"
    tests: ClassVar[str] = "heads/test_sinking.py"
    reproduced: ClassVar[str] = (
        "both parts sum to the difference of eager logits; known vectors; in SmolLM2 the angle makes the sink "
        "(over 2 nats in its sink heads), the paper's claim"
    )
    not_reproduced: ClassVar[str] = "the paper has no number for the split"

    key: int = 0
    part: Literal["angle", "norm"] = "angle"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_key(self.key)
        if self.part not in PARTS:
            raise HeadscopeError(f"part={self.part!r}: choose 'angle' or 'norm'")
        if self.length < 2 or self.key > self.length - 1:
            raise HeadscopeError(
                f"length={self.length}: no query sees another key than the sink; take 2 tokens or more"
            )

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [LogitParts(self.key)]

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        found: dict[str, Any] = {}
        for part in PARTS:
            gap = records[0][f"{part}_gap"].transpose("example", "layer", "head", "query").to_numpy()
            seen = np.isfinite(gap).any(
                axis=(1, 2)
            )  # a query with no other key says nothing; a broken layer is all NaN
            found[part] = [
                np.nanmean(one[..., rows], axis=-1, dtype=np.float64) for one, rows in zip(gap, seen, strict=True)
            ]
        details = [{"gap_nats": {part: float(np.mean(found[part][i])) for part in PARTS}} for i in range(len(samples))]
        return [(by_head(lm, records[0], one), told) for one, told in zip(found[self.part], details, strict=True)]

    def summary(self, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"gap_nats": {part: float(np.mean([one["gap_nats"][part] for one in details])) for part in PARTS}}
