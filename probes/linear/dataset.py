"""Labelled texts to probe with: generated sets that need no download, and the user's own.

A linear probe finds any cue that separates the labels, also one that has nothing to do with the concept. The generated
sets are built so that words alone say nothing, and every result carries the accuracy of a bag of words beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.runs.provenance import hash_texts
from headscope.probes.linear.facts import ATTRACTORS, RELATIONS, SUBJECTS

Statement = tuple[str, int, str]  # text, label, group


@dataclass(frozen=True, eq=False)
class Labelled:
    """Texts with a binary label, and the group (a question) of each, which a split never divides.

    Args:
        texts: prompts, probed where ``positions`` says, by default at their last token.
        labels: 1 (true, plural ...) or 0, one a text.
        groups: a name for what belongs together, one a text; by default every text is a group of its own.
        name: identifies the set; results are called ``probe_NAME``.
        meaning: what label 1 says, in a few words.

    Raises:
        HeadscopeError: unequal lengths, another label than 0 and 1, a missing label, an empty text, a text that carries
            both labels or stands in two groups (it would be on both sides of a split), or fewer than 5 groups.
    """

    texts: Sequence[str]
    labels: NDArray[np.int64]
    groups: Sequence[str] = ()
    name: str = "labelled"
    meaning: str = ""
    group_index: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(self.texts))
        groups = tuple(str(group) for group in self.groups) or tuple(str(i) for i in range(len(self.texts)))
        object.__setattr__(self, "groups", groups)
        labels = np.asarray(self.labels)
        self._check(labels)
        object.__setattr__(self, "labels", labels.astype(np.int64))
        object.__setattr__(self, "group_index", np.unique(groups, return_inverse=True)[1].astype(np.int64))

    def _check(self, labels: NDArray[np.generic]) -> None:
        count = len(self.texts)
        if labels.shape != (count,) or len(self.groups) != count:
            raise HeadscopeError(
                f"{self.name}: {count} texts, {labels.size} labels, {len(self.groups)} groups; give one of each a text"
            )
        if set(np.unique(labels).tolist()) != {0, 1}:
            raise HeadscopeError(f"{self.name}: labels must be 0 and 1, both present; found {set(labels.tolist())}")
        seen: dict[str, tuple[int, str]] = {}
        for text, label, group in zip(self.texts, labels.tolist(), self.groups, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise HeadscopeError(f"{self.name}: a text is empty or not a string; remove it")
            if seen.setdefault(text, (label, group)) != (label, group):
                raise HeadscopeError(f"{self.name}: {text[:60]!r} comes twice, with two labels or in two groups")
        if len(set(self.groups)) < 5:
            raise HeadscopeError(f"{self.name}: {len(set(self.groups))} groups are too few to hold some out; give 5")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def balance(self) -> float:
        """Share of label 1."""
        return float(self.labels.mean())

    @property
    def sha256(self) -> str:
        """Hash of texts, labels and groups."""
        return hash_texts([*self.texts, *map(str, self.labels.tolist()), *self.groups])

    @classmethod
    def read(cls, path: str | Path) -> Labelled:
        """The user's own set: a CSV or JSON-lines file with the columns text, label (0 or 1) and, optionally, group.

        Raises:
            HeadscopeError: the file is missing or unreadable, lacks a column, or ``Labelled`` refuses its content.
        """
        path = Path(path)
        try:
            if path.suffix == ".csv":
                frame = pd.read_csv(path, dtype={"text": str, "group": str})
            else:
                lines = path.read_text(encoding="utf-8").split("\n")
                frame = pd.DataFrame([json.loads(line) for line in lines if line.strip()])
            texts, labels = frame["text"].tolist(), frame["label"].to_numpy()
        except (OSError, ValueError, KeyError) as error:
            raise HeadscopeError(
                f"{path} is not a labelled set ({error}): give a .csv or .jsonl file with columns text, label, group"
            ) from error
        groups = frame["group"].tolist() if "group" in frame else ()
        return cls(texts, labels, groups, name=path.stem)


def truth(seed: int = 0) -> Labelled:
    """True and false answers, ``"Q: What is the capital of France? A: Paris"``: does a head encode truth?

    The prompt and the label of ITI (Li et al. 2023, arXiv 2306.03341, section 3.1, there on TruthfulQA), on capitals,
    continents, languages, animals, opposites, chemical symbols, sums and comparisons of numbers. Questions come in
    pairs that exchange their answers, and a pair is one group:

        capital of France?  Paris 1   Berlin 0        capital of Germany?  Berlin 1   Paris 0

    So every question and every answer is true once and false once within its group, and neither the question nor the
    answer alone, nor any answer seen in training, tells the label. What remains is the relation of the two: a head that
    knows which answer belongs to a question, by whatever association, scores here. ``seed`` decides pairs, numbers and
    order.
    """
    rng = np.random.default_rng(seed)
    statements: list[Statement] = []
    for question, facts in RELATIONS.items():
        for (a, answer_a), (b, answer_b) in _exchanges(facts, rng):
            statements += _exchange(question.format(a), question.format(b), answer_a, answer_b)
    statements += _comparisons(rng, 40)
    statements += _sums(rng, 24)
    return _labelled(statements, "truth", "the answer is true", rng)


def subject_number(seed: int = 0) -> Labelled:
    """``"The keys near the cabinet"``: is the subject, three words back, plural? Groups are subjects.

    After Linzen et al. 2016 (arXiv 1611.01368): the last noun is singular and plural equally often for either label,
    and a split holds out whole nouns, so that the probe must carry number over from other words. Number is spelled out
    (a plural s), which the character baseline shows; the probe asks which heads bring it to the last token.
    """
    rng = np.random.default_rng(seed)
    statements: list[Statement] = []
    for forms in SUBJECTS:
        places = rng.choice(len(ATTRACTORS), size=2, replace=False)
        link = str(rng.choice(["near", "behind", "beside"]))
        for place in places:
            for attractor in ATTRACTORS[place]:
                statements += [(f"The {form} {link} the {attractor}", i, forms[0]) for i, form in enumerate(forms)]
    return _labelled(statements, "subject_number", "the subject is plural", rng)


DATASETS: dict[str, Callable[[int], Labelled]] = {"truth": truth, "subject_number": subject_number}


def load_labelled(dataset: Labelled | str | Path, seed: int = 0) -> Labelled:
    """A labelled set: itself, a generated one by name (``"truth"``, ``"subject_number"``), or a file by path.

    Raises:
        HeadscopeError: neither a known name nor a readable file.
    """
    if isinstance(dataset, Labelled):
        return dataset
    if str(dataset) in DATASETS:
        return DATASETS[str(dataset)](seed)
    if not Path(dataset).exists():
        raise HeadscopeError(f"no labelled set {str(dataset)!r}: take {', '.join(DATASETS)}, or the path of a file")
    return Labelled.read(dataset)


def _labelled(statements: list[Statement], name: str, meaning: str, rng: np.random.Generator) -> Labelled:
    shuffled = [statements[i] for i in rng.permutation(len(statements))]
    texts, labels, groups = zip(*shuffled, strict=True)
    return Labelled(texts, np.array(labels), groups, name, meaning)


def _exchange(question: str, other: str, answer: str, other_answer: str) -> list[Statement]:
    """The four statements of two questions that exchange their answers."""
    rows = [(question, answer, 1), (question, other_answer, 0), (other, other_answer, 1), (other, answer, 0)]
    return [(f"Q: {asked} A: {said}", label, f"{question} / {other}") for asked, said, label in rows]


def _exchanges(
    facts: Sequence[tuple[str, str]], rng: np.random.Generator
) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Random pairs of facts with different answers; a fact without a partner is left out."""
    waiting = [facts[i] for i in rng.permutation(len(facts))]
    while waiting:
        first = waiting.pop()
        partner = next((fact for fact in waiting if fact[1] != first[1]), None)
        if partner is not None:
            waiting.remove(partner)
            yield first, partner


def _comparisons(rng: np.random.Generator, count: int) -> Iterator[Statement]:
    """Which of two numbers below 100 is larger, which smaller: ``count`` pairs of questions."""
    seen: set[frozenset[int]] = set()
    while len(seen) < count:
        a, b = (int(x) for x in rng.choice(np.arange(2, 100), size=2, replace=False))
        if frozenset((a, b)) not in seen:
            seen.add(frozenset((a, b)))
            asked = f"Which number is {{}}, {a} or {b}?"
            yield from _exchange(asked.format("larger"), asked.format("smaller"), str(max(a, b)), str(min(a, b)))


def _sums(rng: np.random.Generator, count: int) -> Iterator[Statement]:
    """Sums of two numbers from 2 to 12 with different results: ``count`` pairs of questions, each sum asked once."""
    sums = [(a, b) for a in range(2, 13) for b in range(2, a)]
    facts = [(f"{a} plus {b}", str(a + b)) for a, b in sums]
    for index, ((a, answer_a), (b, answer_b)) in enumerate(_exchanges(facts, rng)):
        if index == count:
            return
        yield from _exchange(f"What is {a}?", f"What is {b}?", answer_a, answer_b)
