"""The dimension of the residual stream that marks a sink."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.heads.base import Scored
from headscope.interp.heads.texts import StreamMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample

EPSILON = 1e-6  # under the root of the mean square, as in the authors' code


@dataclass(frozen=True, kw_only=True)
class SinkDimension(StreamMethod):
    """Score layers by phi at the sink: the largest |x_d| over the root mean square of the stream, whatever d.

    Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (arXiv 2503.03321;
    src/logic/logic.py) take the largest over two dimensions named for each model; here over all; the one that wins most
    often in each layer is ``provenance["dimensions"]`` ([layer, dimension, share of texts]). phi cannot exceed
    sqrt(d_model). Which dimensions a model has, and the threshold that parts sinks from other tokens, are found by
    ``headscope.interp.heads.sinking.dimensions.sink_dimensions``. phi belongs to the layer, and all of its heads are
    given it.

    What it does not show: anything about one head; or that the dimension marks sinks alone: in small models one
    dimension can be large at every token (``sink_dimensions`` compares).

    Args:
        key: the position of the sink.
    """

    name: ClassVar[str] = "sink_dimension"
    unit: ClassVar[str] = "|x| / rms"
    source: ClassVar[str] = "arXiv 2503.03321"
    tests: ClassVar[str] = "heads/test_sinking.py"
    reproduced: ClassVar[str] = (
        "phi against the model's own hidden states; a known stream; SmolLM2 has one or two sink dimensions "
        "and a threshold near the paper's 20 in layers 4 to 20"
    )
    not_reproduced: ClassVar[str] = "the paper's lists of dimensions: models of 7B and more"

    key: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_key(self.key)

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        layers = records[0]["layer"].to_numpy().tolist()
        found: list[Scored] = []
        for x in relative(self.stream(records[0])[:, :, self.key]):  # (layer, d_model)
            best = np.nan_to_num(x).argmax(axis=-1)
            told = {"dimensions": [[layer, int(d)] for layer, d in zip(layers, best, strict=True)]}
            found.append((self.of_layers(lm, records[0], x.max(axis=-1)), told))
        return found

    def summary(self, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
        by_layer: dict[int, Counter[int]] = {}
        for layer, d in (one for trial in details for one in trial["dimensions"]):
            by_layer.setdefault(layer, Counter())[d] += 1
        won = {layer: min(count.items(), key=lambda one: (-one[1], one[0])) for layer, count in by_layer.items()}
        return {"dimensions": [[layer, d, n / len(details)] for layer, (d, n) in sorted(won.items())]}


def relative(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """|x_d| / rms(x) of states (..., d_model)."""
    return np.asarray(np.abs(x) / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPSILON))
