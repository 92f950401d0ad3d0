"""Additions of n-digit numbers after worked examples, their digits written in four ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.likelihood import answered
from headscope.interp.prompts.pieces import TextPrompt, assembled, continuation
from headscope.interp.runs.journal import Trial
from headscope.interventions.tasks.base import Task, check_among, check_least

FORMS = ("plain", "padded", "reversed", "spaced")


@dataclass(frozen=True)
class Arithmetic(Task):
    """Sums of two n-digit numbers after worked examples, a line each; 1 where the greedy line is the sum, else 0.

    Forms, after Shen et al. 2023: "plain" (12 + 34 = 46); "padded", zeros before every number up to one width for all
    (012 + 034 = 046); "reversed", every number from its last digit on (21 + 43 = 64); "spaced", a space after a digit
    with probability one half, in what is added alone (1 2 + 34 = 46). Problems and examples are the same in all forms.
    ``digits`` above those of the examples are lengths beyond them. Shen et al. train a model on a form, and here it is
    only shown in the prompt; width of padding and places of spaces are [OURS].

    Beside accuracy: that of every form, and of every form and number of digits. Spaces in the answer do not count.

    Prompts publish ``examples`` and ``question``. What it does not show: how far off a wrong sum is (see its response
    and log-probability); a tokenizer that joins digits makes the forms differ in more than their order.

    Args:
        digits: numbers of digits that are asked.
        forms: of the four.
        problems: of every form and number of digits.
        examples: worked ones before the question; 0: none.
        example_digits: numbers of digits of the examples, in turn.
        seed: of the numbers and the spaces.
    """

    digits: Sequence[int] = (1, 2, 3)
    forms: Sequence[str] = FORMS
    problems: int = 4
    examples: int = 4
    example_digits: Sequence[int] = (1, 2)
    seed: int = 0

    name: ClassVar[str] = "arithmetic"
    metric: ClassVar[str] = "exact match"
    unit: ClassVar[str] = "share of trials"
    higher_is_better: ClassVar[bool | None] = True
    source: ClassVar[str] = "after Shen et al. 2023, arXiv 2311.14737"

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting in ("digits", "example_digits"):
            if isinstance(getattr(self, setting), int):
                object.__setattr__(self, setting, (getattr(self, setting),))
        check_least(self, digits=1, problems=1, examples=0, example_digits=1)
        check_among(self, forms=FORMS)

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """Every problem in every form; ``beyond``: it has more digits than any example."""
        longest = max(self.example_digits) if self.examples else 0
        made = []
        for form in dict.fromkeys(self.forms):
            for digits in dict.fromkeys(self.digits):
                for number in range(self.problems):
                    first, second = _drawn(np.random.default_rng([self.seed, digits, number]), digits)
                    own = {"form": form, "digits": digits, "beyond": digits > longest, "number": number}
                    own["group"] = f"{digits} digits, {number}"  # the same sum in every form
                    made.append({**own, "first": first, "second": second})
        return made

    def build(self, lm: LanguageModel, trial: Trial) -> TextPrompt:
        """The prompt of a trial: examples, then the question up to ``=``."""
        rng = np.random.default_rng([self.seed, trial["digits"], trial["number"], 1])
        asked, shown = (trial["first"], trial["second"]), list[tuple[int, int]]()
        while len(shown) < self.examples:
            pair = _drawn(rng, self.example_digits[len(shown) % len(self.example_digits)])
            shown += [pair] if pair != asked else []
        write = self._writer(trial["form"], rng)
        lines = "".join(f"{write(a, True)} + {write(b, True)} = {write(a + b, False)}\n" for a, b in shown)
        question = f"{write(asked[0], True)} + {write(asked[1], True)} ="
        pieces = [("examples", lines)] if lines else []
        return assembled(lm, [*pieces, ("question", question)], room=2 * len(str(sum(asked))) + 2)

    def _writer(self, form: str, rng: np.random.Generator) -> Any:
        """How a number is written in a form; whether it is added, or a sum, is its second argument."""
        width = 1 + max(*self.digits, *self.example_digits)

        def write(number: int, added: bool) -> str:
            text = str(number)
            if form == "padded":
                return text.zfill(width)
            if form == "reversed":
                return text[::-1]
            if form == "spaced" and added:
                return "".join(digit + " " * int(rng.integers(2)) for digit in text).rstrip()
            return text

        return write

    def answer(self, trial: Trial) -> str:
        """The sum as the form writes it."""
        return str(self._writer(trial["form"], np.random.default_rng())(trial["first"] + trial["second"], False))

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        """The prompt's tokens; the most that are generated, and the pass that scores the sum."""
        return len(self.build(lm, trial).ids), self._most(trial) + 1

    def _most(self, trial: Trial) -> int:
        """Tokens of an answer, at most: a digit and a space each, and the line's end."""
        return 2 * len(self.answer(trial)) + 2

    def run(self, lm: LanguageModel, trial: Trial) -> dict[str, Any]:
        """Add greedily.

        Returns:
            score (1 or 0), response, answer, log_probability (of the sum, in nats).
        """
        prompt, answer = self.build(lm, trial), self.answer(trial)
        wanted = continuation(lm, prompt, f" {answer}")
        with prompt.published():
            response, _, found = answered(lm, prompt.ids, wanted, self._most(trial), newline_stop=True)
        right = response.partition("\n")[0].replace(" ", "") == answer
        return {"score": float(right), "response": response, "answer": answer, "log_probability": found.total}

    def summarise(self, trials: pd.DataFrame) -> dict[str, float]:
        """Accuracy of every form, and of every form and number of digits."""
        forms = trials.groupby("form", sort=False)["score"].mean()
        each = trials.groupby(["form", "digits"], sort=False)["score"].mean()
        found = {str(form): float(value) for form, value in forms.items()}
        return found | {f"{form}, {int(digits)} digits": float(value) for (form, digits), value in each.items()}


def _drawn(rng: np.random.Generator, digits: int) -> tuple[int, int]:
    """Two numbers of exactly so many digits."""
    first, second = rng.integers(10 ** (digits - 1), 10**digits, 2)
    return int(first), int(second)
