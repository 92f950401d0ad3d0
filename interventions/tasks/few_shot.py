"""Classification from examples in the context, under the labels' own names or others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.likelihood import likelihoods
from headscope.interp.prompts.pieces import Piece, TextPrompt, assembled, continuation
from headscope.interp.runs.journal import Trial
from headscope.interventions.tasks.base import Task, check_among, check_least
from headscope.interventions.tasks.lines import bundled, json_lines, told

BUNDLED = "kinds.json"
ABSTRACT = ("foo", "bar", "baz", "dax", "wug", "zup", "kiv", "lom")
LABELS = ("true", "shuffled", "permuted", "abstract")


@dataclass(frozen=True)
class FewShot(Task):
    """The label of a text after k examples of each class; 1 where the right label is the likeliest, else 0.

    Labels: "true", by their names; "shuffled", every example with a random label of the task (Min et al. 2022: what is
    left are the labels' names, the texts and the format), the right label being the true one; "permuted", each class by
    the name of another one, the same in all prompts; "abstract", foo, bar and so on (Wei et al. 2023: names that mean
    nothing, so that only the examples tell the classes). A label's score is the log-probability of all its tokens, and
    is not divided by their number.

    Beside accuracy: the share of trials in which each label was chosen. Chance is 1 / classes.

    Prompts publish ``examples``, ``example_0`` and so on, and ``query``. What it does not show: with their own names,
    that anything was learnt from the examples: compare with "shuffled" and "abstract".

    Args:
        data: JSON lines of text and label (None: words of eight kinds, see ``tasks/data``).
        classes: how many, from the first.
        shots: k, examples of each class in a prompt, drawn anew for every query and in random order.
        queries: how many texts are asked, each class in turn.
        labels: "true", "shuffled", "permuted" or "abstract".
        seed: of examples, queries and labels.
    """

    data: str | Path | None = None
    classes: int = 4
    shots: int = 3
    queries: int = 24
    labels: str = "true"
    seed: int = 0

    name: ClassVar[str] = "few_shot"
    metric: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share of trials"
    higher_is_better: ClassVar[bool | None] = True
    source: ClassVar[str] = "after Min et al. 2022, arXiv 2202.12837; Wei et al. 2023, arXiv 2303.03846"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, classes=2, shots=1, queries=1)
        check_among(self, labels=LABELS)

    @cached_property
    def loaded(self) -> dict[str, list[str]]:
        """The texts of every class that is asked.

        Raises:
            HeadscopeError: fewer classes, or fewer texts of one, than a prompt needs.
        """
        every: dict[str, list[str]] = json.loads(bundled(BUNDLED)) if self.data is None else {}
        for one in () if self.data is None else json_lines(self.data, "", ("text", "label")):
            every.setdefault(str(one["label"]).strip(), []).append(str(one["text"]).strip())
        found = {label: list(dict.fromkeys(every[label])) for label in list(every)[: self.classes]}
        most = min(self.classes, len(ABSTRACT)) if self.labels == "abstract" else self.classes
        if len(found) < self.classes or most < self.classes:
            raise HeadscopeError(f"{self.name}: there are {min(len(every), most)} classes; set classes to at most that")
        short = [label for label, texts in found.items() if len(texts) <= self.shots]
        if short:
            raise HeadscopeError(
                f"{self.name}: class {short[0]!r} has {len(found[short[0]])} texts, and {self.shots} examples and a "
                "query need one more than shots: set shots lower"
            )
        return found

    @cached_property
    def written(self) -> dict[str, str]:
        """How every class is called in the prompts."""
        names = list(self.loaded)
        if self.labels == "abstract":
            return dict(zip(names, ABSTRACT, strict=False))
        turn = 1 if self.labels == "permuted" else 0
        return dict(zip(names, names[turn:] + names[:turn], strict=True))

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        """The settings, and the texts by their SHA-256."""
        return super().parameters(lm) | told(self.data, BUNDLED)

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """One trial a query: number, query, label (its class), wanted (as the class is called)."""
        names, made = list(self.loaded), []
        for number in range(self.queries):
            label = names[number % len(names)]
            texts = self.loaded[label]
            query = texts[int(np.random.default_rng([self.seed, number, 0]).integers(len(texts)))]
            made.append({"number": number, "query": query, "label": label, "wanted": self.written[label]})
        return made

    def build(self, lm: LanguageModel, trial: Trial) -> TextPrompt:
        """The prompt of a trial."""
        rng = np.random.default_rng([self.seed, trial["number"], 1])
        names, shown = list(self.loaded), list[tuple[str, str]]()
        for label in names:
            others = [text for text in self.loaded[label] if text != trial["query"]]
            shown += [(others[i], self.written[label]) for i in rng.choice(len(others), self.shots, replace=False)]
        shown = [shown[i] for i in rng.permutation(len(shown))]
        if self.labels == "shuffled":
            shown = [(text, self.written[names[int(rng.integers(len(names)))]]) for text, _ in shown]
        pieces: list[Piece] = [
            (f"example_{place}", f"Input: {text}\nLabel: {label}\n\n") for place, (text, label) in enumerate(shown)
        ]
        asked: list[Piece] = [(None, "Input:"), ("query", f" {trial['query']}"), (None, "\n")]
        prompt = assembled(lm, [*pieces, *asked], "Label:", room=1)
        return prompt.covering("examples", [str(name) for name, _ in pieces])

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        """The prompt's tokens, and a step a label, or one for all where every label is one token."""
        prompt = self.build(lm, trial)
        ways = self._ways(lm, prompt)
        return len(prompt.ids), 1 if all(len(way) == 1 for way in ways) else len(ways)

    def _ways(self, lm: LanguageModel, prompt: TextPrompt) -> list[list[int]]:
        return [continuation(lm, prompt, f" {label}") for label in self.written.values()]

    def run(self, lm: LanguageModel, trial: Trial) -> dict[str, Any]:
        """Choose a label.

        Returns:
            score (1 or 0), chosen, log_probability (of the right label) and margin (over the best other), in nats.
        """
        prompt, labels = self.build(lm, trial), list(self.written.values())
        with prompt.published():
            values = [one.total for one in likelihoods(lm, prompt.ids, self._ways(lm, prompt))]
        gold = labels.index(trial["wanted"])
        others = max(value for place, value in enumerate(values) if place != gold)
        best = int(np.argmax(values))
        return {
            "score": float(best == gold),
            "chosen": labels[best],
            "log_probability": values[gold],
            "margin": values[gold] - others,
        }

    def summarise(self, trials: pd.DataFrame) -> dict[str, float]:
        """The share of trials in which each label was chosen."""
        return {f"chose {label}": float((trials["chosen"] == label).mean()) for label in self.written.values()}
