"""Settings that methods of trained gates share, and how their seeds are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import HeadMethod
from headscope.interp.heads.causal.gates import Tokens
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.patterns import Pair
from headscope.interp.prompts.tokens import body_tokens, check_length, start_tokens
from headscope.interp.runs.journal import Trial

Masks = dict[str, NDArray[np.float64]]  # gates (layer, head) by stage, NaN in layers without attention


@dataclass(frozen=True, kw_only=True)
class GateMethod(HeadMethod):
    """Base of the methods that train gates from several random starts, each of which is a trial.

    Args:
        size: "published" (10 starts, 500 updates a stage, batches of 64; the paper: 15 minutes to an hour a start on an
            H100 for 1 to 8 billion parameters; penalty 0.1) or "small" [OURS], for a CPU (3 starts, 24 updates, or 16
            where there are three stages, batches of 2, and a penalty of 1: with so few, so noisy updates one of 0.1
            does not part the gates). A coarse picture; starts, updates, batch and penalty override it.
        starts: random starts.
        updates: of a stage.
        batch: examples of an update.
        together: starts that are trained in one batch; it changes memory and time, and which starts see the same
            batches.
        examples: pairs that are drawn from, of those given or made.
        penalty: lambda.
        clip: theta is not pushed beyond it.
    """

    SIZES: ClassVar[dict[str, dict[str, int]]] = {
        "small": {"starts": 3, "updates": 24, "batch": 2},
        "published": {"starts": 10, "updates": 500, "batch": 64},
    }
    PENALTIES: ClassVar[dict[str, float]] = {"small": 1.0, "published": 0.1}

    size: Literal["small", "published"] = "small"
    starts: int | None = None
    updates: int | None = None
    batch: int | None = None
    together: int = 1
    examples: int = 256
    penalty: float | None = None
    clip: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size not in self.SIZES:
            raise HeadscopeError(f"size is 'small' or 'published', not {self.size!r}")
        numbers = [*self.sizes.values(), self.together, self.examples]
        if min(numbers) < 1 or self.clip <= 0:
            raise HeadscopeError("starts, updates, batch, together and examples are at least 1, clip above 0")

    @property
    def resample_by(self) -> str | None:
        return "sample"

    @property
    def sizes(self) -> dict[str, int]:
        """Starts, updates and batch, after ``size``."""
        own = {"starts": self.starts, "updates": self.updates, "batch": self.batch}
        return {**self.SIZES[self.size], **{name: value for name, value in own.items() if value is not None}}

    @property
    def weight(self) -> float:
        """The penalty, after ``size``."""
        return self.PENALTIES[self.size] if self.penalty is None else self.penalty

    def trials(self, lm: LanguageModel) -> Sequence[Trial]:
        return [{"sample": i} for i in range(self.sizes["starts"])]

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        return {**super().parameters(lm), **self.sizes, "penalty": self.weight}

    def train(self, lm: LanguageModel, members: Sequence[int]) -> list[Masks]:
        """The gates of these starts, trained together."""
        raise NotImplementedError

    def masks(self, lm: LanguageModel, trial: Trial) -> Masks:
        """The gates of one start; those that are trained together are kept until they are asked for."""
        own = trial["sample"]
        if (id(lm), own) not in self._trained:
            first = own - own % self.together
            members = range(first, min(first + self.together, self.sizes["starts"]))
            self._trained.update({(id(lm), i): m for i, m in zip(members, self.train(lm, members), strict=True)})
        return self._trained.pop((id(lm), own))

    @cached_property
    def _trained(self) -> dict[tuple[int, int], Masks]:
        return {}


def tokenized(lm: LanguageModel, pairs: Sequence[Pair]) -> list[Tokens]:
    """Token ids of prompts, after the tokenizer's own start, and of targets.

    Raises:
        HeadscopeError: a prompt or a target without tokens, or too long a pair.
    """
    found = []
    for prompt, target in pairs:
        x, y = [*start_tokens(lm), *body_tokens(lm, prompt)], body_tokens(lm, target)
        if not x or not y:
            raise HeadscopeError(f"{(prompt, target)!r:.80} has a part without tokens; give other words")
        check_length(lm, len(x) + len(y))
        found.append((x, y))
    return found


def plain(values: NDArray[np.float64]) -> list[list[float | None]]:
    """A table for JSON: None where it is not a number."""
    return [[None if np.isnan(x) else float(x) for x in row] for row in values]
