"""Context activation: in how many contexts a retrieval head fires at all (Wu et al. 2024, property 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from headscope.interp.heads.base import Scored
from headscope.interp.heads.recall.retrieval import Retrieval
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.journal import Trial


@dataclass(frozen=True, kw_only=True)
class ContextActivation(Retrieval):
    """Score heads by the share of contexts in which they copy at least one token of the needle's answer.

    Property 4 of Wu et al. 2024 (arXiv 2404.15574, "dynamically activated": 12 heads of Llama-2-7B always attend to the
    needed tokens, others in some contexts only). The retrieval score averages over tokens; the activation frequency
    asks of every context only whether the head fired on one token: 1 always, 0 never. A head of high frequency and low
    retrieval score fires on certain tokens; a high retrieval score needs both. The authors' code has no such number:
    it is computed here from what ``retrieval`` counts, on the same trials (those that are answered).

    ``provenance["always"]`` and ``["sometimes"]`` list the heads by frequency and say how often; a trial's
    ``copied`` holds the retrieval scores of the heads that fired in it.

    What it does not show: that a head that always fires is needed; what it would do on texts that are not needles.
    "Always" is about the contexts that were run: see their number.

    Args:
        size: the contexts where lengths, depths and needles do not say otherwise. "small" [OURS]: ten bundled needles
            at three depths of 600 tokens, for other facts and places rather than for lengths. "published": the grid of
            ``retrieval``'s authors, three needles at ten depths of up to 20 lengths.
        count: as of ``retrieval``, for ``copied``.
    """

    name: ClassVar[str] = "context_activation"
    unit: ClassVar[str] = "share of contexts"
    tests: ClassVar[str] = "heads/test_recall.py"
    reproduced: ClassVar[str] = "fired where the retrieval score is above 0, by hand and on SmolLM2"
    not_reproduced: ClassVar[str] = "12 heads of Llama-2-7B that always fire"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    SMALL: ClassVar[Mapping[str, Any]] = {"lengths": (600,), "depths": (0, 50, 100), "needles": 10}

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        """1 for the heads that copied anything, and how much in the details."""
        scores, details = super().score(lm, trial)
        if scores is None:
            return None, details
        fired = np.argwhere(scores > 0).tolist()
        copied = {f"L{layer}H{head}": float(scores[layer, head]) for layer, head in fired}
        return np.where(np.isnan(scores), np.nan, scores > 0), {**details, "copied": copied}

    def summary(self, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
        kept = [one["copied"] for one in details if "copied" in one]
        names = sorted({name for one in kept for name in one})
        share = {name: sum(name in one for one in kept) / len(kept) for name in names}
        score = {name: sum(one.get(name, 0.0) for one in kept) / len(kept) for name in names}
        ordered = sorted(names, key=lambda name: (-share[name], -score[name]))
        return {
            "contexts": len(kept),
            "always": [name for name in ordered if share[name] == 1],
            "sometimes": {name: share[name] for name in ordered if share[name] < 1},
            "retrieval_score": {name: score[name] for name in ordered},
        }
