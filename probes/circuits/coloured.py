"""Coloured objects by a generator of our own: a solved example, then a question about one of three objects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.spans import text_span
from headscope.interp.registry import check_counts
from headscope.probes.circuits.ioi import single_tokens
from headscope.probes.patching.pairs import Pairs

SURFACES, SIGHTS = ("table", "desk", "floor"), ("there is", "you see", "I see")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
OBJECTS = (
    "pencil pen cup plate book ball bowl phone key ring hat coin bag box card spoon brush bottle lamp".split()
)  # fmt: skip


@dataclass(frozen=True)
class _Scene:
    """Three objects of three colours somewhere."""

    surface: str
    sight: str
    things: tuple[tuple[str, str], ...]

    def ask(self, which: int) -> str:
        """The question about one of them."""
        shown = [f"{_article(colour)} {colour} {thing}" for colour, thing in self.things]
        return (
            f"Q: On the {self.surface}, {self.sight} {shown[0]}, {shown[1]}, and {shown[2]}. What color is the "
            f"{self.things[which][1]}?\nA:"
        )

    def named(self, which: int) -> list[str]:
        """Colour and object of one of them, then those of the others in their order."""
        order = [which, *(i for i in range(len(self.things)) if i != which)]
        return [" ".join(self.things[i]) for i in order]

    def answer(self, which: int) -> str:
        """Its colour, as a token begins a line with it."""
        return f" {self.things[which][0].title()}"


def coloured_objects(lm: LanguageModel, count: int = 64, *, seed: int = 0) -> Pairs:
    """``count`` pairs of one solved question and one open question; corrupt asks for another object of the same three.

    The task of Merullo et al. 2024 (arXiv 2310.08744; jmerullo/circuit_reuse @ e7cc30e, ``cobjs_data.py``): "Q: On the
    table, there is a red pen, a blue cup, and a green key. What color is the cup?\\nA: Blue\\nQ: ...\\nA:", 3 objects,
    3 of 8 colours, the label a colour with a capital. Objects are words of our own that are one token here, so that a
    pair aligns; drawn anew, not their file of 1,000. A group is a length, in which nothing else need be in the same
    place. Spans: ``object`` that is asked for, its colour ``right`` and the other two ``wrong_0`` and ``wrong_1`` where
    the open question shows them, and ``end``.

    Raises:
        HeadscopeError: the tokenizer has too few of the words as single tokens.
    """
    check_counts(1, count=count)
    lm = load_model(lm)
    objects = [word.strip() for word in single_tokens(lm, OBJECTS)]
    colours = [w for w in COLOURS if len(single_tokens(lm, [w.title()])) == 1]
    if len(objects) < 3 or len(colours) < 3:
        raise HeadscopeError(f"{lm.name}: only {len(objects)} objects and {len(colours)} colours are single tokens")
    rng = np.random.default_rng(seed)
    clean, corrupt, answers, others = [], [], [], []
    shown_at: dict[str, list[tuple[int, int]]] = {"right": [], "wrong_0": [], "wrong_1": []}
    for _ in range(count):
        solved, scene = (_scene(rng, objects, colours) for _ in range(2))
        solved_one, (one, two) = int(rng.integers(3)), rng.choice(3, 2, replace=False).tolist()
        before = solved.ask(solved_one) + solved.answer(solved_one) + "\n"
        clean.append(before + scene.ask(one))
        corrupt.append(before + scene.ask(two))
        answers.append(scene.answer(one))
        others.append(scene.answer(two))
        for name, part in zip(shown_at, scene.named(one), strict=True):
            first, stop = text_span(lm.required_tokenizer(), clean[-1], part, start=len(before))
            shown_at[name].append((first, stop - 1))  # without the object, which is one token
    pairs = Pairs.of(lm, clean, corrupt, answers, others)
    differ = [np.flatnonzero(a != b) for a, b in zip(pairs.clean.numpy(), pairs.corrupt.numpy(), strict=True)]
    if any(len(at) != 1 for at in differ):
        raise HeadscopeError(f"{lm.name}: a pair differs in more than the object that is asked for")
    spans = {
        **shown_at,
        "object": [(int(at[0]), int(at[0]) + 1) for at in differ],
        "end": [(n - 1, n) for n in pairs.lengths.tolist()],
    }
    return Pairs(**{**vars(pairs), "groups": pairs.lengths - pairs.lengths.min(), "spans": spans})


def _scene(rng: np.random.Generator, objects: list[str], colours: list[str]) -> _Scene:
    things = zip(rng.choice(colours, 3, replace=False), rng.choice(objects, 3, replace=False), strict=True)
    held = tuple((str(colour), str(thing)) for colour, thing in things)
    return _Scene(str(rng.choice(SURFACES)), str(rng.choice(SIGHTS)), held)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
