"""Facts that stand in the context, or that a model has to know."""

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
from headscope.interventions.tasks.base import Task, check_among, check_least
from headscope.interventions.tasks.invented import RELATIONS, names, values
from headscope.interventions.tasks.lines import json_lines, told

BUNDLED = "world.jsonl"


@dataclass(frozen=True)
class Facts(Task):
    """The last word of a sentence that states a fact; 1 where the greedy continuation begins with it, else 0.

    With ``where="context"`` the prompt first says where every one of some invented people lives, works and what they
    like, in random order, and then, after ``To sum up:``, begins one of these sentences again. Names and their facts
    are made up, so that memory does not help. With ``where="memory"`` there is no context: the sentence is about the
    world (capitals, languages, continents, opposites; see ``tasks/data``). One edit evaluated with both tells recall
    from the prompt from recall from the weights.

    Beside accuracy: that of every relation, and the means of the rank of the answer's first token (0: the greedy
    choice) and of the answer's log-probability.

    Prompts publish ``question``, the sentence that is begun, and with a context ``context`` and ``fact``, the sentence
    that holds the answer. What it does not show: in the context a sentence begins as it stood there, so that copying
    what followed answers; a word that means the same scores 0.

    Args:
        where: "context" or "memory", where the answer is from.
        questions: how many.
        people: in a context; three sentences each.
        data: of "memory": JSON lines of prompt, object and, if need be, relation (None: 56 bundled facts).
        max_new_tokens: of an answer.
        seed: of the invented people, and of which facts of a file are asked.
    """

    where: str = "context"
    questions: int = 24
    people: int = 2
    data: str | Path | None = None
    max_new_tokens: int = 6
    seed: int = 0

    name: ClassVar[str] = "facts"
    metric: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "share of trials"
    higher_is_better: ClassVar[bool | None] = True
    source: ClassVar[str] = "headscope's own facts"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, questions=1, people=1, max_new_tokens=1)
        check_among(self, where=("context", "memory"))
        if self.data is not None and self.where != "memory":
            raise HeadscopeError(f"{self.name}: data are facts without a context; give where='memory' with it")

    @cached_property
    def loaded(self) -> list[dict[str, Any]]:
        """The facts of memory that are asked, drawn from the file."""
        every = json_lines(self.data, BUNDLED, ("prompt", "object"))
        for number, one in enumerate(every, 1):
            if not all(isinstance(one[key], str) and one[key].strip() for key in ("prompt", "object")):
                raise HeadscopeError(f"fact {number}: prompt and object are texts, not {one!r:.60}")
        order = np.random.default_rng(self.seed).permutation(len(every))
        return [every[i] for i in order[: self.questions]]

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        """The settings, and facts of memory by their SHA-256."""
        return super().parameters(lm) | ({} if self.where == "context" else told(self.data, BUNDLED))

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """One trial a question: number, relation, begun (the sentence up to the answer), object, and the context's
        sentences."""
        if self.where == "context":
            return [self._invented(number) for number in range(self.questions)]
        return [
            {
                "number": number,
                "relation": str(one.get("relation", "")),
                "begun": one["prompt"].rstrip(),
                "object": one["object"].strip(),
                "sentences": [],
            }
            for number, one in enumerate(self.loaded)
        ]

    def _invented(self, number: int) -> Trial:
        rng = np.random.default_rng([self.seed, number])
        people, relation = names(rng, self.people), RELATIONS[number % len(RELATIONS)]
        held = {one.name: values(rng, one, self.people) for one in RELATIONS}
        said = [one.say(name, held[one.name][place]) for one in RELATIONS for place, name in enumerate(people)]
        asked = int(rng.integers(self.people))
        return {
            "number": number,
            "relation": relation.name,
            "begun": relation.begin(people[asked]),
            "object": held[relation.name][asked],
            "sentences": [said[i] for i in rng.permutation(len(said))],
        }

    def build(self, lm: LanguageModel, trial: Trial) -> TextPrompt:
        """The prompt of a trial."""
        begun, sentences = trial["begun"], trial["sentences"]
        if not sentences:
            return assembled(lm, [("question", begun)], room=self.max_new_tokens)
        pieces: list[Piece] = [(f"sentence_{place}", f"{text}\n") for place, text in enumerate(sentences)]
        asked: list[Piece] = [(None, "To sum up:"), ("question", f" {begun}")]
        prompt = assembled(lm, [*pieces, *asked], room=self.max_new_tokens)
        prompt = prompt.covering("context", [str(name) for name, _ in pieces])
        fact = next(place for place, text in enumerate(sentences) if text.startswith(begun))
        spans = {
            "fact": prompt.spans[f"sentence_{fact}"],
            **{key: prompt.spans[key] for key in ("context", "question")},
        }
        return TextPrompt(prompt.text, prompt.ids, spans)

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        """The prompt's tokens; the most that are generated, and the pass that scores the answer."""
        return len(self.build(lm, trial).ids), self.max_new_tokens + 1

    def run(self, lm: LanguageModel, trial: Trial) -> dict[str, Any]:
        """Continue greedily.

        Returns:
            score (1 or 0), response, rank (of the answer's first token), first_log_probability (of that token) and
            log_probability (of the whole answer), in nats.
        """
        prompt = self.build(lm, trial)
        wanted = continuation(lm, prompt, f" {trial['object']}")
        with prompt.published():
            response, _, found = answered(lm, prompt.ids, wanted, self.max_new_tokens, newline_stop=True)
        right = re.match(rf"\W*{re.escape(trial['object'])}(?!\w)", response, re.IGNORECASE)
        return {
            "score": float(right is not None),
            "response": response,
            "rank": int(found.ranks[0]),
            "first_log_probability": float(found.each[0]),
            "log_probability": found.total,
        }

    def summarise(self, trials: pd.DataFrame) -> dict[str, float]:
        """Accuracy of every relation, and the means of rank and log-probability."""
        each = trials.groupby("relation", sort=False)["score"].mean()
        found = {str(relation): float(value) for relation, value in each.items() if relation}
        return found | {
            "rank": float(trials["rank"].mean()),
            "log-probability": float(trials["log_probability"].mean()),
        }
