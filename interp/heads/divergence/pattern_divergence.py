"""Pattern divergence: how a part of the prompt changes where a head looks among the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.heads.base import Scored, by_head
from headscope.interp.heads.divergence.contexts import DocumentContext
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import KeyMass, Statistic


@dataclass(frozen=True, kw_only=True)
class PatternDivergence(DocumentContext):
    """Score heads by the Jensen-Shannon divergence of their patterns with and without a span, on the keys of both.

    [OURS], beside ``context_divergence``: of the last position's pattern with the span, the keys outside the span,
    renormalised to sum 1, against the pattern without it: nats, 0 (the rest is looked at as before, in proportion) to
    log 2. ``span_mass`` of a trial is what the span took, by head, averaged.

    What it does not show: how much the head looks at the span (that mass is taken out before), or what it writes.
    Where the span takes nearly all of a head's mass, its rest is little and noisy. Keys that a sliding window hides
    with the span and shows without it count as changes.
    """

    name: ClassVar[str] = "pattern_divergence"
    unit: ClassVar[str] = "nats"
    range: ClassVar[tuple[float, float] | None] = (0.0, float(np.log(2)))
    source: ClassVar[str] = "beside arXiv 2412.13949"
    tests: ClassVar[str] = "heads/test_context_divergence.py"
    reproduced: ClassVar[str] = "Jensen-Shannon on shared keys against eager weights, padded on either side; by hand"
    not_reproduced: ClassVar[str] = "no paper: a measure of ours beside VHD"

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        length = len(samples[0].ids)
        return [KeyMass(queries=(length - 1, length))]  # the last row is its pattern

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        both = [r["key_mass"].transpose("example", "layer", "head", "key").to_numpy() for r in records]
        found: list[Scored] = []
        for sample, with_span, alone in zip(samples, *both, strict=True):
            keep = np.ones(len(sample.ids), dtype=bool)
            for first, stop in sample.trial["removed"]:
                keep[first:stop] = False
            p, q = (by_head(lm, records[0], x.astype(np.float64)) for x in (with_span, alone))
            taken = float(np.nanmean(p[..., ~keep].sum(-1)))
            found.append((jensen_shannon(p[..., keep], q), {"span_mass": taken}))
        return found


def jensen_shannon(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Jensen-Shannon divergence in nats of patterns (..., key), each divided by its sum; NaN where one has none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
        m = (p + q) / 2
        terms = [np.where(x > 0, x * np.log(x / m), np.where(np.isnan(x), np.nan, 0.0)).sum(-1) for x in (p, q)]
    return np.asarray(np.clip((terms[0] + terms[1]) / 2, 0.0, np.log(2)))
