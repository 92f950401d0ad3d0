"""Emergence of position bias: what depth and the causal mask make of where a token stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored, by_head
from headscope.interp.heads.texts import TextMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import Rollout, Statistic


@dataclass(frozen=True, kw_only=True)
class PositionBias(TextMethod):
    """Score heads by the share of the first token in what they read at the last one, followed down through all layers.

    Wu et al. 2025, "On the Emergence of Position Bias in Transformers" (arXiv 2502.01951): the cumulative context
    probability P_t(i, j) = (A_t ... A_0)_ij, which under a causal mask goes to 1 for the first token as layers are
    stacked. A head's score is its own A_(t,h) P_(t-1) at the last row; the mean over a layer's heads is P_t. [OURS]:
    the paper's models have one head a layer and no other path; here heads are averaged before the product, as in
    attention rollout. ``provenance["influence"]`` has P_t of the last row over ``parts`` equal parts of the text, one
    row a layer: the bias of the model (``parts`` = ``length``: of every position).

    What it does not show: what is carried. Values, MLPs and norms are left out, and without ``residual`` so is the
    stream that each token keeps: a share near 1 does not mean that the model's output depends on the first token.

    Args:
        residual: the share of each layer's output that is its input (0: the paper's theorems; 0.5: attention rollout).
        parts: how many equal parts of the text the influence is told for; one of them is longer where they do not fit.
    """

    name: ClassVar[str] = "position_bias"
    unit: ClassVar[str] = "share of the input"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    source: ClassVar[str] = "arXiv 2502.01951"
    tests: ClassVar[str] = "heads/test_position.py"
    reproduced: ClassVar[str] = (
        "rollout against eager weights with and without residual; uniform attention layer by layer in closed "
        "form; the first token's share passes 0.9 with SmolLM2's depth, the paper's claim"
    )
    not_reproduced: ClassVar[str] = "the paper's trained toy models (no residual path, NoPE)"

    length: int = 128
    residual: float = 0.0
    parts: int = 16
    samples: int = 20
    batch: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.parts <= self.length:
            raise HeadscopeError(f"parts={self.parts}: divide {self.length} tokens into 1 to {self.length} parts")
        self._rollout()

    def _rollout(self) -> Rollout:
        edges = [self.length * part // self.parts for part in range(self.parts + 1)]
        equal = {str(part): (edges[part], edges[part + 1]) for part in range(self.parts)}
        return Rollout({"first": (0, 1), **equal}, residual=self.residual)

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [self._rollout()]

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        last = records[0]["rollout"].isel(query=-1).transpose("example", "source", "layer", "head").to_numpy()
        found: list[Scored] = []
        for one in last.astype(np.float64):
            influence = one[1:].mean(axis=-1).T  # (layer, part)
            found.append((by_head(lm, records[0], one[0]), {"influence": influence.tolist()}))
        return found

    def summary(self, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"influence": np.mean([one["influence"] for one in details], axis=0).tolist()}
