"""Previous-token heads: they look one position back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headscope.interp.heads.targets import TargetMethod
from headscope.interp.prompts import sequences


@dataclass(frozen=True, kw_only=True)
class PreviousToken(TargetMethod):
    """Score heads by the mass that queries put on the token before them.

    The mean of A[i, i - 1] over all queries i >= 1. These heads let an induction head know what came before a key:
    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (section on two-layer models), and Olsson et
    al. 2022 (arXiv 2209.11895). On [BOS] + n random tokens + the same n, where content gives no reason to look back, or
    on text.

    What it does not show: that the head carries the token's identity, or that anything reads it. The previous position
    of query 1 is the first token, where sinks rest: one query in 2n.
    """

    name: ClassVar[str] = "previous_token"
    source: ClassVar[str] = "arXiv 2209.11895"
    tests: ClassVar[str] = "heads/test_heads.py"
    reproduced: ClassVar[str] = (
        "the mean of A[i, i - 1] against eager weights; a hand-made head scores 1; SmolLM2 has few such heads"
    )
    target = staticmethod(sequences.position_before)
