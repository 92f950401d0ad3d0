"""How large the residual stream is at the sink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr

from headscope.interp.heads.base import Scored
from headscope.interp.heads.sinking.norms import ratio
from headscope.interp.heads.texts import StreamMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample


@dataclass(frozen=True, kw_only=True)
class SinkHiddenNorm(StreamMethod):
    """Score layers by the L2 norm of the residual stream at one position, the sink's, over the mean norm of the others.

    Gu et al. 2024 (arXiv 2410.10781; eval_activations_open_source.py) plot the norms of the hidden states that enter
    each layer (and of the final ones, after the last norm, which no layer reads and which are left out): far larger at
    the first token in the middle layers. The ratio is ours. It belongs to the layer, and all of its heads are given it.

    What it does not show: anything about one head, or which dimensions hold the norm (``massive_activations``).

    Args:
        key: the position of the sink.
    """

    name: ClassVar[str] = "sink_hidden_norm"
    unit: ClassVar[str] = "ratio of norms"
    source: ClassVar[str] = "arXiv 2410.10781"
    tests: ClassVar[str] = "heads/test_sinking.py"
    reproduced: ClassVar[str] = (
        "a known stream, and the model's own hidden states; SmolLM2's first token is more than 3 times as "
        "long in the middle layers (median), as the paper finds"
    )

    key: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_key(self.key)

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        norms = np.linalg.norm(self.stream(records[0]), axis=-1)  # (example, layer, position)
        return [(self.of_layers(lm, records[0], one), {}) for one in ratio(norms, self.key)]
