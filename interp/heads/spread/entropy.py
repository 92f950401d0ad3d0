"""Attention entropy: how evenly a head spreads over the keys that a query sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored, by_head
from headscope.interp.heads.texts import TextMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import Entropy, Statistic


@dataclass(frozen=True, kw_only=True)
class AttentionEntropy(TextMethod):
    """Score heads by the mean entropy of their patterns over the last rows of a text, in nats.

    Zhang et al. 2025 (parallel context encoding; mspx/core/selatt.py): -sum_k p log p of the rows of the scored tokens
    and the one before them, averaged over rows and texts. The paper also averages over heads, reads 8192 tokens and
    scores the last 1024, and compares contexts that are encoded in pieces; here the context is whole, every head is
    kept apart, and the lengths are a sixteenth of the paper's, which small models read. In float32, where the code has
    bfloat16.

    What it does not show: over which keys. Entropy grows with the keys that a row sees (at most log of their number):
    compare heads at one length, and layers with sliding windows among themselves. A sink lowers it.

    Args:
        scored: the last tokens whose rows count, with the one before them (the paper's 1024 of 8192).
    """

    name: ClassVar[str] = "attention_entropy"
    unit: ClassVar[str] = "nats"
    source: ClassVar[str] = "arXiv 2412.16545"
    recorded: ClassVar[str] = "entropy"
    tests: ClassVar[str] = "heads/test_spread.py"
    reproduced: ClassVar[str] = "entropy against eager weights, padded on either side; uniform attention in closed form"
    not_reproduced: ClassVar[str] = "8,192 tokens and parallel encoding: `spread` reads whole contexts"

    length: int = 512
    scored: int = 64
    samples: int = 20
    batch: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.scored < self.length:
            raise HeadscopeError(
                f"scored={self.scored}: score at least 1 and fewer than the {self.length} tokens of a text"
            )

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [Entropy()]

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        of_query = records[0][self.recorded].transpose("example", "layer", "head", "query").to_numpy()
        rows = self.of_rows(of_query[..., -self.scored - 1 :].astype(np.float64))
        return [(by_head(lm, records[0], one), {}) for one in rows.mean(axis=-1)]

    @staticmethod
    def of_rows(recorded: NDArray[np.float64]) -> NDArray[np.float64]:
        """A row's value from what was recorded of it."""
        return recorded
