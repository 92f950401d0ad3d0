"""FAI: how much later tokens come back to a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.anchors.responses import ResponseMethod, future_attention, future_statistics
from headscope.interp.heads.base import Scored, by_head
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import Statistic


@dataclass(frozen=True, kw_only=True)
class FutureAttention(ResponseMethod):
    """Score heads by the attention that tokens of the response receive from later ones, on average.

    FAI of Li et al. 2025 (arXiv 2510.13554): the mean of A[t, s] over the rows t of the response from s + ``lowest`` to
    s + ``highest``, of the mean pattern of the global heads. Here each head keeps its own, averaged over the response's
    tokens that have such a row; ``headscope.interp.heads.anchors.rhythm`` gives the paper's, token by token. The
    paper's analysis looks to the end of the response, as the default does; it does not print its lowest distance: 10
    is a third party's, who takes 10 to 50.

    What it does not show: which tokens are come back to. A head of long spans that is even scores 1 / (keys seen) too:
    the paper reads the peaks over tokens.

    Args:
        lowest: the nearest row that counts, in tokens after the token.
        highest: the farthest (None: the end of the response).
    """

    name: ClassVar[str] = "fai"
    unit: ClassVar[str] = "mass"
    tests: ClassVar[str] = "heads/test_anchors.py"
    reproduced: ClassVar[str] = "future attention at three horizons against eager weights, padded on either side"
    not_reproduced: ClassVar[str] = (
        "Jaccard of forced tokens (.534 and .631): needs the paper's model; the lowest distance is not "
        "printed by the paper"
    )
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    lowest: int = 10
    highest: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        future_statistics(self.lowest, self.highest)
        if self.length - self.prompt <= self.lowest:
            raise HeadscopeError(
                f"of {self.length - self.prompt} response tokens none has a row {self.lowest} later: read longer texts"
            )

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return future_statistics(self.lowest, self.highest)

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        received = future_attention(records[0], self.prompt, self.lowest, self.highest)
        received = received[..., : self.length - self.prompt - self.lowest]  # those with a row so much later
        return [(by_head(lm, records[0], one), {}) for one in received.mean(axis=-1)]
