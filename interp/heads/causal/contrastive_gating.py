"""Contrastive head gating: which heads one task can do without so that another fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored
from headscope.interp.heads.causal.gates import Stage, fit, gated, log_probabilities, shuffled, start
from headscope.interp.heads.causal.head_gating import attended_gates
from headscope.interp.heads.causal.settings import GateMethod, Masks, tokenized
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.patterns import Pair, load_pairs, pattern_pairs
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.provenance import hash_texts

LIMIT = 5.0  # of a difference of log-probabilities


@dataclass(frozen=True, kw_only=True)
class ContrastiveGating(GateMethod):
    """Score heads by how far their gate closes when one task is to be forgotten and another kept: 1 - G.

    Nam et al. 2025, "Causal Head Gating" (arXiv 2505.13737, Eq. 2, Section 6.2). On matched pairs of a task R to retain
    and a task F to forget, gates as in ``head_gating`` make small the mean of
    clip(log P(y_F | x_F) - log P(y_R | x_R), -5, 5), minus lambda times the mean over heads of clip(theta, -4, 4): one
    stage from G ~ U(0, 1), rate 0.1 to 0.01. The text has lambda > 0, which opens what need not close, and the appendix
    -0.1: ``penalty`` is positive here. Log-probabilities are means over a target's tokens.

    What differs: means stand for the paper's sums; defaults are small [OURS]: ``size="published"``. The score 1 - G is
    ours, so that high means "closed"; the paper reads the gates themselves.

    What it does not show: that the closed heads are all that F needs, or that only F needs them.

    Args:
        retain: pairs of the task to keep (see ``head_gating``), by default A^ B^ A.
        forget: as many pairs of the other task, by default A^ B^ B on the same words.
    """

    name: ClassVar[str] = "contrastive_gating"
    unit: ClassVar[str] = "1 - gate"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    source: ClassVar[str] = "arXiv 2505.13737"
    tests: ClassVar[str] = "heads/test_gating.py"
    reproduced: ClassVar[str] = "gates close for what only the forgotten task needs, on a hand-made model"
    not_reproduced: ClassVar[str] = '500 updates (`size="published"`): hours on a CPU'

    retain: Sequence[Pair] | str | Path | None = None
    forget: Sequence[Pair] | str | Path | None = None

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        x, y = tokenized(lm, self._pairs()[0][:1])[0]
        return 2 * self.sizes["updates"] * self.sizes["batch"] * (len(x) + len(y)) * 3, 0  # backward: twice forward

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        held = super().parameters(lm)
        if self.retain is None:
            return {**held, "retain": "ABA", "forget": "ABB"}
        hashes = [hash_texts([text for pair in pairs for text in pair]) for pairs in self._pairs()]
        return {**held, **dict(zip(("retain", "forget"), hashes, strict=True))}

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        return 1 - self.masks(lm, trial)["gate"], {}

    def train(self, lm: LanguageModel, members: Sequence[int]) -> list[Masks]:
        """The gates of every start."""
        retain, forget = (tokenized(lm, pairs) for pairs in self._pairs())
        draw = shuffled(len(retain), self.sizes["batch"])
        rng = np.random.default_rng([self.seed, members[0], 1])
        with gated(lm) as gates:

            def objective(rng: np.random.Generator) -> Tensor:
                chosen = draw(rng)
                kept, lost = (log_probabilities(lm, gates, [task[i] for i in chosen]) for task in (retain, forget))
                return (lost - kept).clamp(-LIMIT, LIMIT).mean(1)

            first = start(self.seed, members, lm.info.layers, lm.info.heads).to(lm.device)
            stage = Stage(self.sizes["updates"], 0.1, 0.01, self.weight, self.clip)
            theta = fit(gates, first, objective, stage, rng)
        return [{"gate": attended_gates(theta[i], gates.layers)} for i in range(len(members))]

    def _pairs(self) -> tuple[list[Pair], list[Pair]]:
        if (self.retain is None) != (self.forget is None):
            raise HeadscopeError("give pairs to retain and pairs to forget, or neither")
        if self.retain is None or self.forget is None:
            return pattern_pairs(self.examples, "ABA", self.seed), pattern_pairs(self.examples, "ABB", self.seed)
        retain, forget = load_pairs(self.retain), load_pairs(self.forget)
        if len(retain) != len(forget):
            raise HeadscopeError(f"{len(retain)} pairs to retain do not match {len(forget)} to forget; give as many")
        return retain[: self.examples], forget[: self.examples]
