"""Massive activations: few numbers of the residual stream that are far larger than all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import xarray as xr

from headscope.interp.heads.base import Scored
from headscope.interp.heads.texts import StreamMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample


@dataclass(frozen=True, kw_only=True)
class MassiveActivations(StreamMethod):
    """Score layers by the largest magnitude in the residual stream over the median magnitude.

    Sun et al. 2024, "Massive Activations in Large Language Models" (arXiv 2402.17762): of the state (token, dimension)
    that leaves a layer, an activation is massive if its magnitude exceeds 100 and is about 1000 times the median
    magnitude of that state. The score is max / median over a text's tokens; the massive ones stand in each trial's
    details as [layer, position, dimension, value], and ``provenance["massive"]`` counts them by [layer, position,
    dimension] over texts. "About" is read as "at least". The ratio belongs to the layer, and all of its heads are given
    it.

    What it does not show: anything about one head. The two thresholds are for models of 7 billion parameters; in
    smaller ones the largest activations may miss them, which says nothing about sinks (``sinks`` does).

    Args:
        magnitude, times: the two thresholds, of |x| and of |x| over the median.
    """

    name: ClassVar[str] = "massive_activations"
    unit: ClassVar[str] = "ratio to the median"
    source: ClassVar[str] = "arXiv 2402.17762"
    tests: ClassVar[str] = "heads/test_sinking.py"
    reproduced: ClassVar[str] = "a known stream, and the model's own hidden states"
    not_reproduced: ClassVar[str] = (
        "magnitudes above 100 and 1000 times the median in 7B models: the thresholds are theirs, SmolLM2's "
        "values are reported beside them"
    )

    place: Literal["resid_pre", "resid_post"] = "resid_post"
    magnitude: float = 100.0
    times: float = 1000.0

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        layers = records[0]["layer"].to_numpy()
        found: list[Scored] = []
        for x in self.stream(records[0]):  # (layer, position, d_model)
            size = np.abs(x)
            median = np.median(size, axis=(1, 2))
            massive = (size > self.magnitude) & (size >= self.times * median[:, None, None])
            listed = [[int(layers[i]), int(t), int(d), float(x[i, t, d])] for i, t, d in np.argwhere(massive)]
            found.append((self.of_layers(lm, records[0], size.max(axis=(1, 2)) / median), {"massive": listed}))
        return found

    def summary(self, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
        places = [tuple(one[:3]) for trial in details for one in trial["massive"]]
        return {"massive": [[*place, places.count(place)] for place in sorted(set(places))]}
