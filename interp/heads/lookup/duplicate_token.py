"""Duplicate-token heads: they look at an earlier occurrence of the token they stand on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headscope.interp.heads.targets import TargetMethod
from headscope.interp.prompts import sequences


@dataclass(frozen=True, kw_only=True)
class DuplicateToken(TargetMethod):
    """Score heads by the mass that a token puts on its own previous occurrence.

    Duplicate token heads of Wang et al. 2022, "Interpretability in the Wild: a Circuit for Indirect Object
    Identification in GPT-2 small" (arXiv 2211.00593, section 3), which the paper checks on repeated random tokens: on
    [BOS] + n random tokens + the same n, the mean of A[i, i - n] over the n queries i of the second half. The tokens
    are all different, so each query has one earlier occurrence. On text, the mean over the queries whose token occurred
    before, targeting its most recent occurrence.

    What it does not show: that the head tells the model about the repetition. On random repeats a head that always
    looks n back would score 1 too; compare another ``length``. Keys outside a layer's sliding window count as 0.
    """

    name: ClassVar[str] = "duplicate_token"
    source: ClassVar[str] = "arXiv 2211.00593"
    tests: ClassVar[str] = "heads/test_heads.py"
    reproduced: ClassVar[str] = (
        "the mass on the earlier occurrence against eager weights; a hand-made head scores 1; SmolLM2 has few "
        "such heads"
    )
    not_reproduced: ClassVar[str] = "the GPT-2 small heads of the paper: no such weights without a hub"
    target = staticmethod(sequences.previous_occurrence)
