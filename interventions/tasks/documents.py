"""One answer among several documents, with the document that holds it at every place: the position-bias curve."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.likelihood import answered
from headscope.interp.prompts.pieces import Piece, TextPrompt, assembled, continuation
from headscope.interp.runs.journal import Trial
from headscope.interventions.tasks.base import Task, check_least
from headscope.interventions.tasks.invented import ASIDES, RELATIONS, names, pick, values
from headscope.interventions.tasks.lines import json_lines, told

FIELDS = ("question", "answer", "documents", "gold")


@dataclass(frozen=True)
class Asked:
    """A question, its answer, the document that holds it, the others, and how the answer is begun."""

    question: str
    answer: str
    gold: str
    others: tuple[str, ...]
    begun: str = ""


@dataclass(frozen=True)
class DocumentsTask(Task):
    """A question about one of k documents, with that document at each of the k places; 1 where the greedy answer holds
    the answer's words, else 0.

    The others keep their order, so that only the place of one document changes (Liu et al. 2023, "Lost in the Middle",
    whose score is the same: the answer occurs in what the model writes, without case, punctuation and articles). Beside
    accuracy at every place: the answer's log-probability there, and ``spread``, the largest accuracy of a place less
    the smallest.

    Prompts publish ``document_0`` and so on (without gaps: what ``Pine`` and its like read as ``"document"``),
    ``documents``, from the first to the last, ``gold`` and ``question``. Documents are not numbered, so that nothing
    but their order changes.

    The bundled documents are two sentences each, the first about an invented person, so that the answer is in no
    model's memory; that sentence begins the answer, so that its log-probability is that of the fact alone. What it does
    not show: a flat curve may be flat because the model finds nothing, so read it with the accuracy; places closer than
    a document are not told apart.

    Args:
        data: JSON lines of question, answer, documents and gold, the place of the right one from 0, and if need be
            begun, words that begin the answer (None: made from invented people).
        questions: how many, from the first.
        documents: k; of a file the first k - 1 others are read.
        chat: ask through the chat template; the assistant's turn begins with ``Answer:`` and what is begun.
        max_new_tokens: of an answer, which also ends at a newline.
        seed: of the invented people.
    """

    data: str | Path | None = None
    questions: int = 8
    documents: int = 5
    chat: bool = False
    max_new_tokens: int = 8
    seed: int = 0

    name: ClassVar[str] = "documents"
    metric: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share of trials"
    higher_is_better: ClassVar[bool | None] = True
    source: ClassVar[str] = "Liu et al. 2023, arXiv 2307.03172"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, questions=1, documents=2, max_new_tokens=1)

    @cached_property
    def loaded(self) -> list[Asked]:
        """The questions.

        Raises:
            HeadscopeError: a file of another form, or fewer documents than asked for.
        """
        if self.data is None:
            return [self._invented(number) for number in range(self.questions)]
        lines = json_lines(self.data, "", FIELDS)[: self.questions]
        return [self._read(number, one) for number, one in enumerate(lines, 1)]

    def _invented(self, number: int) -> Asked:
        rng = np.random.default_rng([self.seed, number])
        relation, people = RELATIONS[number % len(RELATIONS)], names(rng, self.documents)
        told_of = values(rng, relation, self.documents)
        texts = [
            f"{relation.say(name, value)} {aside}"
            for name, value, aside in zip(people, told_of, pick(rng, ASIDES, self.documents), strict=True)
        ]
        question, begun = relation.question.format(name=people[0]), relation.begin(people[0])
        return Asked(question, told_of[0], texts[0], tuple(texts[1:]), begun)

    def _read(self, number: int, made: dict[str, Any]) -> Asked:
        texts, gold = made["documents"], made["gold"]
        fits = isinstance(texts, list) and all(isinstance(one, str) and one.strip() for one in texts)
        if not fits or not isinstance(gold, int) or not 0 <= gold < len(texts) or not _words(str(made["answer"])):
            raise HeadscopeError(
                f"question {number}: documents is a list of texts, gold the place of one, from 0, and answer has a word"
            )
        others = [text for place, text in enumerate(texts) if place != gold]
        if len(others) < self.documents - 1:
            raise HeadscopeError(
                f"question {number} has {len(texts)} documents and {self.documents} are asked for: set documents lower"
            )
        rest, begun = tuple(others[: self.documents - 1]), str(made.get("begun", "")).strip()
        return Asked(str(made["question"]), str(made["answer"]), texts[gold], rest, begun)

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        """The settings, and a file by its SHA-256."""
        return super().parameters(lm) | ({} if self.data is None else told(self.data, ""))

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """Every question with its document at every ``place``, from 0."""
        return [
            {"group": number, "question": number, "place": place}
            for number in range(len(self.loaded))
            for place in range(self.documents)
        ]

    def build(self, lm: LanguageModel, trial: Trial) -> TextPrompt:
        """The prompt of a trial."""
        asked, place = self.loaded[trial["question"]], trial["place"]
        texts = [*asked.others[:place], asked.gold, *asked.others[place:]]
        parts: list[Piece] = [(f"document_{number}", f"{text}\n") for number, text in enumerate(texts)]
        pieces: list[Piece] = [(None, "Read these notes.\n"), *parts, (None, "Question:")]
        pieces += [("question", f" {asked.question}"), (None, "\n")]
        cue = f"Answer: {asked.begun}".rstrip()
        prompt = assembled(lm, pieces, cue, chat=self.chat, room=self.max_new_tokens)
        spans = {**prompt.spans, "gold": prompt.spans[f"document_{place}"]}
        return TextPrompt(prompt.text, prompt.ids, spans).covering("documents", [str(name) for name, _ in parts])

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        """The prompt's tokens; the most that are generated, and the pass that scores the answer."""
        return len(self.build(lm, trial).ids), self.max_new_tokens + 1

    def run(self, lm: LanguageModel, trial: Trial) -> dict[str, Any]:
        """Answer greedily.

        Returns:
            score (1 or 0), response, answer, log_probability (of the answer, in nats).
        """
        prompt, answer = self.build(lm, trial), self.loaded[trial["question"]].answer
        wanted = continuation(lm, prompt, f" {answer}")
        with prompt.published():
            response, _, found = answered(lm, prompt.ids, wanted, self.max_new_tokens, newline_stop=True)
        right = f" {_words(answer)} " in f" {_words(response)} "
        return {"score": float(right), "response": response, "answer": answer, "log_probability": found.total}

    def summarise(self, trials: pd.DataFrame) -> dict[str, float]:
        """Accuracy and log-probability at every place, from 1, and how far accuracies lie apart."""
        each = trials.groupby("place")[["score", "log_probability"]].mean()
        found = {f"accuracy at {int(place) + 1}": float(value) for place, value in each["score"].items()}
        found |= {
            f"log-probability at {int(place) + 1}": float(value) for place, value in each["log_probability"].items()
        }
        return found | {"spread": float(each["score"].max() - each["score"].min())}


def _words(text: str) -> str:
    """A text's words, without case, punctuation and articles."""
    return " ".join(word for word in re.findall(r"\w+", text.casefold()) if word not in ("a", "an", "the"))
