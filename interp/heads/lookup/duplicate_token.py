"""Duplicate-token heads: they look at an earlier occurrence of the token they stand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headscope.interp.heads.passes import Text, target_scores, with_settings
from headscope.interp.prompts import sequences
from headscope.interp.results.scores import HeadScores


@with_settings
def duplicate_token(
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
    """Score heads by the mass that a token puts on its own previous occurrence.

    Duplicate token heads of Wang et al. 2022, "Interpretability in the Wild: a Circuit for Indirect Object
    Identification in GPT-2 small" (arXiv 2211.00593, section 3), which the paper checks on repeated random tokens: on
    [BOS] + n random tokens + the same n, the mean of A[i, i - n] over the n queries i of the second half. The tokens
    are all different, so each query has one earlier occurrence. On text, the mean over the queries whose token occurred
    before, targeting its most recent occurrence.

    What it does not show: that the head tells the model about the repetition. On random repeats a head that always
    looks n back would score 1 too; compare another ``length``. Keys outside a layer's sliding window count as 0.
    """
    return target_scores(
        "duplicate_token",
        lm,
        sequences.previous_occurrence,
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
