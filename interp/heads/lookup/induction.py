"""Induction heads: having read A B ... A, they look at B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from headscope.interp.heads.targets import TargetMethod
from headscope.interp.prompts import sequences


@dataclass(frozen=True, kw_only=True)
class Induction(TargetMethod):
    """Score heads by the mass that a token puts on the token after its previous occurrence.

    The prefix matching score of Olsson et al. 2022, "In-context Learning and Induction Heads" (arXiv 2209.11895), on
    [BOS] + n random tokens + the same n: the mean of A[i, i - (n - 1)] over the n queries i of the second half. (The
    paper repeats more often and counts every earlier repeat; one repeat is the field's usual form.) The tokens are all
    different, so each query has one target. On text, the mean over the queries whose token occurred before, targeting
    the key after its most recent occurrence; a token that directly follows itself is left out, as its target would be
    itself.

    What it does not show: that the head copies what it looks at (the paper's other half of the definition, measured on
    its output), that the model needs the head, or how the head finds the place. On random repeats a head that always
    looks n - 1 back would score 1 too; compare another ``length``. On text, frequent tokens make up most queries, and
    the target is often the neighbourhood of a sink or of the query. Keys outside a layer's sliding window count as 0.
    """

    name: ClassVar[str] = "induction"
    source: ClassVar[str] = "arXiv 2209.11895"
    tests: ClassVar[str] = "heads/test_heads.py"
    reproduced: ClassVar[str] = (
        "the prefix-matching score, on repeats and on text, against eager weights; a hand-made head scores 1, "
        "the others 0; SmolLM2 has few such heads, and those of random tokens are those of text"
    )
    not_reproduced: ClassVar[str] = "the paper's repeats of more than one: the field's single repeat is computed"
    target = staticmethod(sequences.after_previous_occurrence)
