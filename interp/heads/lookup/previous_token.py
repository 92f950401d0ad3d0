"""Previous-token heads: they look one position back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headscope.interp.heads.passes import Text, target_scores, with_settings
from headscope.interp.prompts import sequences
from headscope.interp.results.scores import HeadScores


@with_settings
def previous_token(
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
    """Score heads by the mass that queries put on the token before them.

    The mean of A[i, i - 1] over all queries i >= 1. These heads let an induction head know what came before a key:
    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (section on two-layer models), and Olsson et
    al. 2022 (arXiv 2209.11895). On [BOS] + n random tokens + the same n, where content gives no reason to look back, or
    on text.

    What it does not show: that the head carries the token's identity, or that anything reads it. The previous position
    of query 1 is the first token, where sinks rest: one query in 2n.
    """
    return target_scores(
        "previous_token",
        lm,
        sequences.position_before,
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
