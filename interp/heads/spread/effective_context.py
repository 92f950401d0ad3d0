"""Effective context: over how many keys a head spreads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from headscope.interp.heads.spread.entropy import AttentionEntropy


@dataclass(frozen=True, kw_only=True)
class EffectiveContext(AttentionEntropy):
    """Score heads by the effective number of keys that a row attends to: the mean of exp(entropy), from 1 up.

    The number of equally weighted keys that would have the row's entropy: the diversity of order 1 of Hill 1973. [OURS]
    as a measure of heads, on the rows of ``attention_entropy``: exp is taken of each row, then averaged, so it is more
    than exp of the mean entropy.

    What it does not show: how far away the keys are (``head_span``), or which. At most the keys that a row sees.
    """

    name: ClassVar[str] = "effective_context"
    unit: ClassVar[str] = "keys"
    source: ClassVar[str] = "doi:10.2307/1934352"
    tests: ClassVar[str] = "heads/test_spread.py"
    reproduced: ClassVar[str] = (
        "exp of the entropy against eager weights; uniform attention in closed form; in SmolLM2 sinks are "
        "narrow (rank correlation below -0.5)"
    )

    @staticmethod
    def of_rows(recorded: NDArray[np.float64]) -> NDArray[np.float64]:
        """The row's effective number of keys."""
        return np.asarray(np.exp(recorded))
