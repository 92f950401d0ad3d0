"""Induction heads: having read A B ... A, they look at B."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headscope.interp.heads.passes import Text, target_scores, with_settings
from headscope.interp.prompts import sequences
from headscope.interp.results.scores import HeadScores


@with_settings
def induction(
    lm: Any,
    *,
    text: Text | None = None,
    length: int = 50,
    window: int = 256,
    samples: int = 20,
    bos: bool = True,
    batch: int = 10,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> HeadScores:
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
    return target_scores(
        "induction",
        lm,
        sequences.after_previous_occurrence,
        text=text,
        length=length,
        window=window,
        samples=samples,
        bos=bos,
        batch=batch,
        seed=seed,
        out=out,
        progress=progress,
    )
