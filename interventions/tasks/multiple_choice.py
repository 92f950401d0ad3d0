"""Multiple choice, every question with its options in several orders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import factorial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.likelihood import Likelihood, likelihoods
from headscope.interp.prompts.pieces import Piece, TextPrompt, assembled, continuation
from headscope.interp.runs.journal import Trial
from headscope.interventions.tasks.base import Task, check_among, check_least
from headscope.interventions.tasks.lines import json_lines, told

BUNDLED = "questions.jsonl"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NORMALISED = ("sum", "token", "character", "byte")


@dataclass(frozen=True)
class Question:
    """A question, its options, and the place of the right one."""

    question: str
    options: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class MultipleChoice(Task):
    """Questions with options, each asked with its options in several orders; 1 where the right one is chosen, else 0.

    The prompt is ``Question:`` and the question, its options as lines ``A. text``, and ``Answer:``, each on a line
    [OURS; MMLU in lm-evaluation-harness has no ``Question:``]. ``scoring="letter"``, the default, chooses the letter
    that is likeliest next;
    ``"cloze"`` the option whose text is, divided as ``normalise`` says: with "sum", the default, accuracy is what
    lm-evaluation-harness calls acc, with "character" its acc_norm, with "byte" its acc_bytes; "token" is the mean a
    token. Cloze prompts do not list the options unless ``listed`` says so; then their order cannot matter, and one is
    asked.

    Beside accuracy: the share of trials in which each letter was chosen, accuracy by the right option's letter, and
    ``consistent``, the share of questions for which the same option is chosen in all orders. With rotations every
    option stands at every letter equally often, so that unequal shares are the model's: anchored bias is a share of "A"
    above the others (Li & Gao 2024, whose data have two options, the right one always B).

    Prompts publish ``question``; where options are listed ``options``, ``option_0`` and so on in their shown order,
    ``letter_0`` and so on, ``anchor``, the first letter, and ``gold_letter``: what ``SwapKeys`` exchanges.

    What it does not show: that the model knows an answer: a letter may be likely for its own sake. Where one
    letter is chosen in every trial, rotations make accuracy 1 / k exactly, whatever else an edit does: read the shares
    of letters first, or score ``"cloze"`` (SmolLM2-135M always chooses A here). The bundled questions were made from
    lists of words of eight kinds: one word of the kind that is asked for, three of others (see ``tasks/data``).

    Args:
        data: JSON lines of question, options, answer: a letter, or an index from 0 (None: 40 bundled questions).
        questions: how many of them, from the first (None: all).
        orders: how many orders, the given one and random ones from ``seed`` (None: all cyclic rotations).
        scoring: "letter" or "cloze".
        normalise: of cloze scores: "sum", "token", "character" or "byte".
        listed: show the options (None: for letters only).
        chat: ask through the chat template; the assistant's turn begins with ``Answer:``.
        seed: of random orders.
    """

    data: str | Path | None = None
    questions: int | None = 12
    orders: int | None = None
    scoring: str = "letter"
    normalise: str = "sum"
    listed: bool | None = None
    chat: bool = False
    seed: int = 0

    name: ClassVar[str] = "multiple_choice"
    metric: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share of trials"
    higher_is_better: ClassVar[bool | None] = True
    source: ClassVar[str] = "after Li & Gao 2024, arXiv 2405.03205; Wang et al. 2024, arXiv 2407.01100"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, questions=1, orders=1)
        check_among(self, scoring=("letter", "cloze"), normalise=NORMALISED)
        if self.scoring == "letter" and (self.normalise != "sum" or self.listed is False):
            raise HeadscopeError(f"{self.name}: letters are listed and not normalised: give scoring='cloze' with that")

    @cached_property
    def loaded(self) -> list[Question]:
        """The questions."""
        lines = json_lines(self.data, BUNDLED, ("question", "options", "answer"))
        return [_question(number, one) for number, one in enumerate(lines[: self.questions], 1)]

    @property
    def shown(self) -> bool:
        """Whether the options are listed."""
        return self.scoring == "letter" if self.listed is None else self.listed

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        """The settings, and the questions by their SHA-256."""
        return super().parameters(lm) | told(self.data, BUNDLED)

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """Every question in every order: ``order`` holds the options' places in the file, as they are shown."""
        return [
            {"group": number, "question": number, "turn": turn, "order": order}
            for number, question in enumerate(self.loaded)
            for turn, order in enumerate(self._orders(number, len(question.options)))
        ]

    def _orders(self, number: int, count: int) -> list[list[int]]:
        plain = list(range(count))
        if not self.shown:
            return [plain]
        if self.orders is None:
            return [plain[turn:] + plain[:turn] for turn in plain]
        rng, found = np.random.default_rng([self.seed, number]), [plain]
        while len(found) < min(self.orders, factorial(count)):
            drawn = rng.permutation(count).tolist()
            found += [drawn] if drawn not in found else []
        return found

    def build(self, lm: LanguageModel, trial: Trial) -> TextPrompt:
        """The prompt of a trial."""
        question = self.loaded[trial["question"]]
        pieces: list[Piece] = [(None, "Question:"), ("question", f" {question.question}")]
        for place, option in enumerate(trial["order"] if self.shown else ()):
            pieces += [
                (None, "\n"),
                (f"letter_{place}", LETTERS[place]),
                (f"option_{place}", f". {question.options[option]}"),
            ]
        prompt = assembled(lm, [*pieces, (None, "\n")], "Answer:", chat=self.chat, room=1)
        if not self.shown:
            return prompt
        names = [f"{kind}_{place}" for place in range(len(question.options)) for kind in ("letter", "option")]
        gold = trial["order"].index(question.gold)
        more = {"anchor": prompt.spans["letter_0"], "gold_letter": prompt.spans[f"letter_{gold}"]}
        return TextPrompt(prompt.text, prompt.ids, {**prompt.spans, **more}).covering("options", names)

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        """The prompt's tokens, and a step a continuation."""
        prompt = self.build(lm, trial)
        ways = self._ways(lm, trial, prompt)
        return len(prompt.ids), 1 if all(len(way) == 1 for way in ways) else len(ways)

    def _ways(self, lm: LanguageModel, trial: Trial, prompt: TextPrompt) -> list[list[int]]:
        options = self.loaded[trial["question"]].options
        texts = LETTERS[: len(options)] if self.scoring == "letter" else [options[i] for i in trial["order"]]
        return [continuation(lm, prompt, f" {text}") for text in texts]

    def run(self, lm: LanguageModel, trial: Trial) -> dict[str, Any]:
        """Choose an option.

        Returns:
            score (1 or 0), letter and chosen (the chosen option's letter and text), gold_letter, margin (of the right
            option's value over the best other, in nats), log_probabilities (of the continuations, in the shown order).
        """
        question, order = self.loaded[trial["question"]], trial["order"]
        prompt = self.build(lm, trial)
        with prompt.published():
            found = likelihoods(lm, prompt.ids, self._ways(lm, trial, prompt))
        values = [self._value(question.options[i], one) for i, one in zip(order, found, strict=True)]
        best, gold = int(np.argmax(values)), order.index(question.gold)
        return {
            "score": float(best == gold),
            "letter": LETTERS[best],
            "chosen": question.options[order[best]],
            "gold_letter": LETTERS[gold],
            "margin": values[gold] - max(value for place, value in enumerate(values) if place != gold),
            "log_probabilities": [one.total for one in found],
        }

    def _value(self, text: str, likelihood: Likelihood) -> float:
        counts = {"sum": 1, "token": len(likelihood.each), "character": len(text), "byte": len(text.encode())}
        return likelihood.total / counts[self.normalise]

    def summarise(self, trials: pd.DataFrame) -> dict[str, float]:
        """Share of each letter, accuracy by the right option's letter, and consistency over orders."""
        letters = LETTERS[: max(len(question.options) for question in self.loaded)]
        found = {f"chose {letter}": float((trials["letter"] == letter).mean()) for letter in letters}
        by_gold = trials.groupby("gold_letter")["score"].mean()
        found |= {f"right at {letter}": float(by_gold[letter]) for letter in letters if letter in by_gold}
        each = trials.groupby("question")["chosen"].agg(["nunique", "size"])
        if (each["size"] > 1).any():
            found["consistent"] = float((each["nunique"] == 1)[each["size"] > 1].mean())
        return found


def _question(number: int, made: dict[str, Any]) -> Question:
    """A question from a line of a file.

    Raises:
        HeadscopeError: options that are no different texts, or an answer that is none of them.
    """
    options, answer = made["options"], made["answer"]
    plain = isinstance(options, list) and all(isinstance(one, str) and one.strip() for one in options)
    if not plain or not 2 <= len(options) <= len(LETTERS) or len(set(options)) < len(options):
        raise HeadscopeError(f"question {number}: options are 2 to {len(LETTERS)} different texts, not {options!r:.60}")
    letters = LETTERS[: len(options)]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        answer = letters.index(answer.strip().upper())
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise HeadscopeError(
            f"question {number}: answer is a letter from A to {letters[-1]} or an index from 0 to {len(options) - 1}, "
            f"not {answer!r:.60}"
        )
    return Question(str(made["question"]), tuple(options), answer)
