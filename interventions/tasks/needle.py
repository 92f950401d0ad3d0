"""The needle in a haystack as a task: how much of a hidden sentence the answer holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.decoding import answer_text, decode, prefill
from headscope.interp.prompts.haystack import Needles, rouge1_recall
from headscope.interp.prompts.needle import NeedlePrompts
from headscope.interp.runs.journal import Trial
from headscope.interventions.tasks.base import Task

HELD_OUT = ("password", "train", "prize")  # bundled needles that head discovery does not use by itself


@dataclass(frozen=True, eq=False)
class NeedleTask(NeedlePrompts, Task):
    """Recall of a sentence hidden in a haystack, in [0, 1] (Wu et al. 2024, arXiv 2404.15574, Section 2).

    The settings of ``NeedlePrompts``, small by default: 600 tokens, three depths, and three needles that
    ``discover retrieval`` does not use by itself, so that heads are not judged on what they were found with.

    Args:
        grouped: count a needle's trials as one, so that intervals and p speak of other needles and not only of other
            places for these; that takes six needles or more.
    """

    depths: int | Sequence[float] = (0, 50, 100)
    needles: Needles = HELD_OUT
    grouped: bool = False

    name: ClassVar[str] = "needle"
    metric: ClassVar[str] = "ROUGE-1 recall"
    unit: ClassVar[str] = "share of the answer's words"
    higher_is_better: ClassVar[bool | None] = True
    source: ClassVar[str] = "Wu et al. 2024, arXiv 2404.15574"
    usual_lengths: ClassVar[tuple[int, ...]] = (600,)

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """Every needle at every length and depth; where ``grouped``, its ``group`` is the needle."""
        found = super().trials(lm)
        return [{**trial, "group": trial["needle"]} for trial in found] if self.grouped else found

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        """Those of the prompts, and ``grouped``."""
        return {**super().parameters(lm), "grouped": self.grouped}

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        """A trial's prompt tokens and the most that are generated."""
        return int(trial["length"]), self.max_new_tokens

    def run(self, lm: LanguageModel, trial: Trial) -> dict[str, Any]:
        """Answer one prompt greedily and measure the answer's recall, with whatever is attached to the model.

        Returns:
            score (ROUGE-1 recall of the needle's answer, 0 to 1), response, tokens (of the prompt), new_tokens,
            position (the answer's first token), all JSON-able.

        Raises:
            HeadscopeError: as of ``build``, or logits that are not numbers.
        """
        prompt = self.build(lm, trial)
        with prompt.published():
            cache = prefill(lm, prompt.ids[:-1])
            new = decode(lm, cache, prompt.ids[-1], self.max_new_tokens, newline_stop=self.newline_stop)
        response = answer_text(lm, new)
        score = rouge1_recall(prompt.needle.real_needle, response, stem=self.stem)
        place = {"tokens": len(prompt.ids), "position": prompt.span[0], "new_tokens": len(new)}
        return {"score": score, "response": response, **place}
