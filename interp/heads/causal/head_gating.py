"""Causal head gating: heads that help, hinder, or do not matter, by gates fitted twice from each of several starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored
from headscope.interp.heads.causal.gates import Stage, fit, gated, log_probabilities, shuffled, start
from headscope.interp.heads.causal.settings import GateMethod, Masks, plain, tokenized
from headscope.interp.heads.causal.toggling import toggle
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.patterns import Pair, load_pairs, pattern_pairs
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.provenance import hash_texts

Role = Literal["facilitation", "interference", "irrelevance"]
ROLES: tuple[str, ...] = get_args(Role)
THRESHOLD = 0.5  # from which a head is said to have a role
UNSEEN = 8  # pairs on which heads are toggled


@dataclass(frozen=True, kw_only=True)
class HeadGating(GateMethod):
    """Score heads by how much a task needs them, suffers from them, or does not care, from gates on their outputs.

    Nam et al. 2025, "Causal Head Gating" (arXiv 2505.13737, Eq. 1, Table 1, Section 6.2). A gate G in [0, 1] scales
    every query head's z before the output projection, at all positions; G = sigmoid(theta), the model frozen. From
    G ~ U(0, 1), gates are fitted to the targets' log-probability (rate 0.1 to 0.01); from there twice more (rate 0.5 to
    0.1) with the penalty -lambda clip(theta, -4, 4): lambda = 0.1 opens what does not hurt (G+), -0.1 closes what does
    not help (G-). Facilitation is G-, interference 1 - G+, irrelevance G+ (1 - G-). A head has a role from 0.5 on;
    G+ low and G- high is inconsistent. (The running text prints irrelevance as G- (1 - G+), a misprint; the published
    package has the roles the other way round. Table 1 is what is meant, and computed.)

    A trial is a start, and starts differ: in the paper 72 % of a model's heads facilitate syntax in some start and
    1.2 % in all. ``role_table(scores)`` has mean, least and largest value and the share of starts for every head and
    role, ``role_scores(scores)`` the scores of every role, of one run; ``provenance`` the percentages over heads.

    What differs: the paper sums over examples and over heads; here the loss is the mean over a batch of the mean over a
    target's tokens, and lambda multiplies the mean over heads, as in the package. The package also clips the gradient's
    norm; the paper does not say so, and it is left out. Defaults are small [OURS]: ``size="published"``.

    A gate beyond the clip (1.8 % of the draws on either side) feels no penalty and stays there unless the task moves
    it: that is the published rule, and one more reason for several starts.

    What it does not show: where a head acts, and that roles hold for other prompts; gates far from 0 and 1 put the
    model where it never was.

    Args:
        role: which of the three is the score.
        pairs: (prompt, target) pairs, or a file with one {"prompt": ..., "target": ...} a line. By default the paper's
            A^ B^ A task on words of the bundled prose (``headscope.interp.prompts.patterns``).
        toggled: the authors' validation, for so many heads of each role: every trial's ``toggled``, and their mean in
            ``provenance``, say what the target's log-probability gains where the first k are closed rather than open,
            from G+ (see ``headscope.interp.heads.causal.toggling``): negative for facilitation, about 0 for
            irrelevance, positive for interference. On pairs that gates were not fitted to, where they are not given.
    """

    SIZES: ClassVar[dict[str, dict[str, int]]] = {
        **GateMethod.SIZES,
        "small": {**GateMethod.SIZES["small"], "updates": 16},  # of each of three stages: minutes on two cores
    }

    name: ClassVar[str] = "head_gating"
    unit: ClassVar[str] = "gate"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    source: ClassVar[str] = "arXiv 2505.13737"
    tests: ClassVar[str] = "heads/test_gating.py"
    reproduced: ClassVar[str] = (
        "log-probabilities and gradients against scaled projection inputs; one stage by hand; hand-made heads "
        "get their roles; SmolLM2's two penalties part the gates"
    )
    not_reproduced: ClassVar[str] = (
        "500 updates of 64 examples on 10 starts, size='published': hours on a CPU; the paper's shares of roles, of "
        "Llama-3.2"
    )

    role: Role = "facilitation"
    pairs: Sequence[Pair] | str | Path | None = None
    toggled: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.role not in ROLES:
            raise HeadscopeError(f"role is {', '.join(map(repr, ROLES))}, not {self.role!r}")
        if self.toggled < 0:
            raise HeadscopeError(f"toggled={self.toggled}: toggle 1 head of each role or more, or none (0)")

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        x, y = tokenized(lm, self._pairs()[:1])[0]
        fitted = 3 * self.sizes["updates"] * self.sizes["batch"] * 3  # backward: twice forward
        return (fitted + 2 * len(ROLES) * self.toggled * UNSEEN) * (len(x) + len(y)), 0

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        held = super().parameters(lm)
        texts = [text for pair in self._pairs() for text in pair]
        return {**held, "pairs": "ABA" if self.pairs is None else hash_texts(texts)}

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        masks = self.masks(lm, trial)
        details: dict[str, Any] = {stage: plain(values) for stage, values in masks.items()}
        if self.toggled:
            roles = {role: role_of(role, masks["retained"], masks["removed"]) for role in ROLES}
            details["toggled"] = toggle(lm, masks["retained"], roles, self.toggled, tokenized(lm, self._unseen()))
        return role_of(self.role, masks["retained"], masks["removed"]), details

    def train(self, lm: LanguageModel, members: Sequence[int]) -> list[Masks]:
        """G+ ("retained") and G- ("removed") of every start."""
        data, sizes = tokenized(lm, self._pairs()), self.sizes
        draw = shuffled(len(data), sizes["batch"])
        rng = np.random.default_rng([self.seed, members[0], 1])
        with gated(lm) as gates:

            def objective(rng: np.random.Generator) -> Any:
                return -log_probabilities(lm, gates, [data[i] for i in draw(rng)]).mean(1)

            first = start(self.seed, members, lm.info.layers, lm.info.heads).to(lm.device)
            theta = fit(gates, first, objective, Stage(sizes["updates"], 0.1, 0.01, 0.0, self.clip), rng)
            signs = {"retained": self.weight, "removed": -self.weight}
            stages = {name: Stage(sizes["updates"], 0.5, 0.1, sign, self.clip) for name, sign in signs.items()}
            found = {name: fit(gates, theta, objective, stage, rng) for name, stage in stages.items()}
        return [{name: attended_gates(x[i], gates.layers) for name, x in found.items()} for i in range(len(members))]

    def summary(self, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
        has = {role: _each(role, details) >= THRESHOLD for role in ROLES}
        real = ~np.isnan(_each(ROLES[0], details))
        none = real & ~np.any(list(has.values()), axis=0)
        heads = max(1, int(real[0].sum()))
        deltas = [one["toggled"] for one in details if "toggled" in one]
        means = {role: np.mean([one[role] for one in deltas], axis=0).tolist() for role in ROLES} if deltas else None
        return {
            **({} if means is None else {"log_probability_gained_when_closed": means}),
            "percent_of_heads_in_some_start": {r: 100 * float(x.any(0).sum()) / heads for r, x in has.items()},
            "percent_of_heads_in_every_start": {r: 100 * float(x.all(0).sum()) / heads for r, x in has.items()},
            "inconsistent_percent": 100 * float(none.sum()) / (heads * len(real)),
        }

    def _unseen(self) -> list[Pair]:
        """Pairs to toggle heads on: drawn with a seed of their own, or else the given ones' first."""
        return pattern_pairs(UNSEEN, "ABA", self.seed + 1) if self.pairs is None else self._pairs()[:UNSEEN]

    def _pairs(self) -> list[Pair]:
        found = pattern_pairs(self.examples, "ABA", self.seed) if self.pairs is None else load_pairs(self.pairs)
        return found[: self.examples]


def role_of(role: str, retained: NDArray[np.float64], removed: NDArray[np.float64]) -> NDArray[np.float64]:
    """The score of a role from G+ and G-, as in Table 1."""
    if role == "facilitation":
        return removed
    return 1 - retained if role == "interference" else retained * (1 - removed)


def role_scores(scores: HeadScores) -> dict[str, HeadScores]:
    """The scores of all three roles from a run for one.

    Raises:
        HeadscopeError: scores of another method.
    """
    if not scores.details or any("retained" not in one for one in scores.details):
        raise HeadscopeError(f"{scores.method} keeps no gates; give the scores of head_gating")
    return {role: replace(scores, method=role, trials=_each(role, scores.details)) for role in ROLES}


def role_table(scores: HeadScores) -> pd.DataFrame:
    """One row a head and role: mean, interval over starts, least, largest, and in how large a share of starts the head
    has the role (score of 0.5 or more)."""
    rows = []
    for role, one in role_scores(scores).items():
        frame = one.to_frame().rename(columns={"score": "mean"})
        at = frame["layer"].to_numpy(), frame["head"].to_numpy()
        of_head = one.trials[:, at[0], at[1]]  # (start, row)
        frame.insert(0, "role", role)
        rows.append(frame.assign(least=of_head.min(0), largest=of_head.max(0), share=(of_head >= THRESHOLD).mean(0)))
    return pd.concat(rows, ignore_index=True)


def _each(role: str, details: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """A role's scores (start, layer, head), from the gates that trials keep."""
    both = [[np.array(one[stage], dtype=np.float64) for one in details] for stage in ("retained", "removed")]
    return role_of(role, np.array(both[0]), np.array(both[1]))


def attended_gates(theta: Any, layers: set[int]) -> NDArray[np.float64]:
    """Gates of a start (layer, head), NaN in layers that did not attend."""
    found = theta.sigmoid().double().cpu().numpy()
    found[[layer for layer in range(len(found)) if layer not in layers]] = np.nan
    return np.asarray(found)
