"""Trials of the needle task and their prompts, built to an exact number of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.boundary import prompt_boundary
from headscope.interp.prompts.haystack import (
    Needle,
    Needles,
    boundary_before,
    insertion_point,
    load_haystack,
    load_needles,
    sentence_ends,
)
from headscope.interp.prompts.spans import encode, span_in
from headscope.interp.runs.journal import Trial
from headscope.interp.statistics.spans import Span, published_spans

PAPER_LENGTHS = tuple(int(n) for n in np.round(np.linspace(1000, 50000, 20)))  # retrieval_head_detection.py
LEAST_HAYSTACK = 16  # tokens of text around a needle, below which its depth means nothing
CHAT = "<book>{context}</book>\nBased on the content of the book, Question: {question}\nAnswer:"
BASE = "{context}\nBased on the content of the book, Question: {question}\nAnswer:"


@dataclass(frozen=True, eq=False)
class NeedlePrompt:
    """One prompt. ``ids`` are the tokens of ``text``; ``span`` holds the answer (``real_needle``), ``needle_span`` the
    whole sentence and ``question_span`` the question (None where its tokens cannot be told), as token positions
    (first, stop) in ``ids``."""

    needle: Needle
    text: str
    ids: tuple[int, ...]
    span: Span
    needle_span: Span
    question_span: Span | None = None

    @contextmanager
    def published(self) -> Iterator[None]:
        """Inside the block its spans ``needle``, ``answer`` and ``question`` may be named, and its end is known."""
        spans = {"needle": self.needle_span, "answer": self.span, "question": self.question_span}
        with published_spans({name: x for name, x in spans.items() if x is not None}), prompt_boundary(len(self.ids)):
            yield


@dataclass(frozen=True, eq=False)
class NeedlePrompts:
    """The prompts of the needle-in-a-haystack test of Wu et al. 2024 (arXiv 2404.15574, Section 2 and
    retrieval_head_detection.py).

    Args:
        lengths: tokens of the full prompt (None: those of ``usual_lengths`` that fit the model's context with the new
            tokens; here the authors' 20 from 1,000 to 50,000).
        depths: percents of the context, or a number of them from 0 to 100 (10: the authors').
        needles: as of ``load_needles``.
        haystack: a text file (None: the bundled novel).
        paraphrased: ask each needle's ``paraphrase``.
        chat: force or forbid the chat template (None: used where the tokenizer has one).
        max_new_tokens: of an answer, at most.
        newline_stop: end an answer at its first newline, as the authors do: models that begin with a newline then
            answer nothing.
        stem: goes to ``rouge1_recall``.
        beyond: take lengths beyond the model's context too, for edits of positions that are to reach further.

    The needle is set as a line of its own at the sentence end at or before the depth (a clause's end within a very
    long sentence); depth 100 appends it. Each needle starts reading the haystack at another place, as the authors give
    each needle its own book; text that is shorter than the prompt is repeated, as theirs is. Differences:

    - The bundled needles are not their three (see ``load_needles``).
    - Line breaks stand around the needle and before "Based on the content"; theirs have none at either place.
    - An answer also ends at a token that ends a text or a turn; theirs ends at a newline or after 50 tokens only, so
      that tokens after an end of text could still score. It ends at a newline only with ``newline_stop``.
    - Sentence ends and the needle's span are found in the text (their period ids are of one vocabulary, and their span
      may begin a token early); the prompt has exactly ``length`` tokens, not ``length`` - 200 and a bit.
    """

    lengths: Sequence[int] | None = None
    depths: int | Sequence[float] = 10
    needles: Needles = None
    haystack: str | Path | None = None
    paraphrased: bool = False
    chat: bool | None = None
    max_new_tokens: int = 50
    newline_stop: bool = False
    stem: Callable[[str], str] | None = None
    beyond: bool = False

    usual_lengths: ClassVar[tuple[int, ...]] = PAPER_LENGTHS

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """Every needle at every length and depth: needle (its name), length, depth.

        Raises:
            HeadscopeError: a length beyond the model's context or too short for the needle, a depth outside 0 to 100,
                a needle that the haystack already tells, or a missing paraphrase.
        """
        lengths = self.lengths_for(lm)
        for needle in self.loaded.values():
            self._check(needle)
            self.build(lm, {"needle": needle.name, "length": min(lengths), "depth": 0})
        return [
            {"needle": name, "length": length, "depth": depth}
            for name in self.loaded
            for length in lengths
            for depth in self.percents
        ]

    @cached_property
    def loaded(self) -> dict[str, Needle]:
        """The needles by name."""
        return {needle.name: needle for needle in load_needles(self.needles)}

    @cached_property
    def text(self) -> str:
        """The haystack."""
        return load_haystack(self.haystack)

    @cached_property
    def _ends(self) -> list[int]:
        return sentence_ends(self.text)

    @cached_property
    def percents(self) -> list[float]:
        """The depths, in percent of the context."""
        asked = np.round(np.linspace(0, 100, self.depths)) if isinstance(self.depths, int) else np.asarray(self.depths)
        values = [int(d) if float(d).is_integer() else float(d) for d in asked]
        if not values or min(values) < 0 or max(values) > 100 or len(set(values)) < len(values):
            raise HeadscopeError(f"depths are different percents from 0 to 100, or their number; got {self.depths}")
        return values

    def lengths_for(self, lm: LanguageModel) -> list[int]:
        """Prompt lengths that ``lm`` can take together with the new tokens.

        Raises:
            HeadscopeError: a length that was asked for does not fit, or none of the usual ones does.
        """
        limit = None if self.beyond else lm.info.context_length
        most = None if limit is None else limit - self.max_new_tokens
        if self.lengths is None:
            fitting = [n for n in self.usual_lengths if most is None or n <= most]
            if not fitting:
                raise HeadscopeError(
                    f"{lm.name} has a context of {limit} tokens, shorter than the shortest usual prompt "
                    f"({self.usual_lengths[0]} and {self.max_new_tokens} new tokens): pass lengths=[...]"
                )
            return fitting
        lengths = [int(n) for n in self.lengths]
        if not lengths or len(set(lengths)) < len(lengths):
            raise HeadscopeError(f"lengths are different numbers of tokens, at least one; got {list(self.lengths)}")
        if most is not None and max(lengths) > most:
            raise HeadscopeError(
                f"a prompt of {max(lengths)} tokens and {self.max_new_tokens} new ones exceed the context of {lm.name} "
                f"({limit} tokens): ask for lengths up to {most}, or give beyond=True"
            )
        return lengths

    def build(self, lm: LanguageModel, trial: Trial) -> NeedlePrompt:
        """The prompt of a trial: exactly ``trial["length"]`` tokens, or as few less as its tokenizer can hit.

        Raises:
            HeadscopeError: no tokenizer, an unknown needle, a needle that does not survive tokenization or the chat
                template, or a length too short to hold it.
        """
        tokenizer = lm.required_tokenizer()
        if trial["needle"] not in self.loaded:
            raise HeadscopeError(f"unknown needle {trial['needle']!r}; this task has {', '.join(self.loaded)}")
        needle, length = self.loaded[trial["needle"]], int(trial["length"])
        source = self._source(needle, length)
        stops = _token_ends(tokenizer, source)
        overhead = len(encode(tokenizer, self._prompt(lm, needle, f"\n{needle.needle}\n"))[0])
        if length < overhead + LEAST_HAYSTACK:
            raise HeadscopeError(
                f"needle {needle.name!r} and its question take {overhead} tokens: a prompt of {length} is too short, "
                f"ask for at least {overhead + LEAST_HAYSTACK}"
            )

        def make(cut: int, target: int) -> tuple[int, str]:
            text = self._prompt(lm, needle, _insert(source[:cut], target, needle.needle))
            return len(encode(tokenizer, text)[0]), text

        text = _fit(make, stops, float(trial["depth"]), length, length - overhead)
        return _located(tokenizer, needle, self._question(needle), text)

    def uses_chat(self, lm: LanguageModel) -> bool:
        """Whether prompts go through the chat template."""
        return bool(getattr(lm.tokenizer, "chat_template", None)) if self.chat is None else self.chat

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        """The settings as JSON-able values; texts by their SHA-256, so that a resumed run is known to be the same."""
        needles = [needle.to_dict() for needle in self.loaded.values()]
        return {
            "lengths": self.lengths_for(lm),
            "depths": self.percents,
            "needles": list(self.loaded),
            "needles_sha256": hashlib.sha256(repr(needles).encode()).hexdigest(),
            "haystack": "bundled" if self.haystack is None else Path(self.haystack).name,
            "haystack_sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "paraphrased": self.paraphrased,
            "chat": self.chat,
            "max_new_tokens": self.max_new_tokens,
            "newline_stop": self.newline_stop,
            "stem": None if self.stem is None else getattr(self.stem, "__qualname__", repr(self.stem)),
        } | ({"beyond": True} if self.beyond else {})

    def _check(self, needle: Needle) -> None:
        if needle.real_needle.casefold() in self.text.casefold():
            raise HeadscopeError(f"the haystack already tells needle {needle.name!r}; choose another text or needle")
        if self.paraphrased and not needle.paraphrase:
            raise HeadscopeError(f"needle {needle.name!r} has no paraphrase; add one, or ask its question")

    def _source(self, needle: Needle, length: int) -> str:
        """Haystack text for at least ``length`` tokens (of up to 8 characters), from this needle's own place."""
        names = list(self.loaded)
        at = boundary_before([0, *self._ends], len(self.text) * names.index(needle.name) // len(names))
        rotated = (self.text[at:] + "\n\n" + self.text[:at]).strip()
        while len(rotated) < 8 * length:
            rotated += "\n\n" + rotated
        return rotated[: 8 * length]

    def _question(self, needle: Needle) -> str:
        return str(needle.paraphrase) if self.paraphrased else needle.question

    def _prompt(self, lm: LanguageModel, needle: Needle, context: str) -> str:
        question = self._question(needle)
        if self.uses_chat(lm):
            return str(lm.chat(CHAT.format(context=context, question=question)))
        return BASE.format(context=context, question=question)


def _token_ends(tokenizer: Any, text: str) -> list[int]:
    """Character position at which each token of ``text`` ends; spread evenly for a tokenizer without offsets, whose
    prompts are measured whole anyway."""
    ids, offsets = encode(tokenizer, text, special_tokens=False)
    if offsets is None:
        return [round((i + 1) * len(text) / len(ids)) for i in range(len(ids))]
    return [stop for _, stop in offsets]


def _insert(context: str, target: int, needle: str) -> str:
    """``context`` with the needle as a line of its own at or before character ``target`` (see ``insertion_point``)."""
    at = target if target in (0, len(context)) else insertion_point(context, target)
    before, after = context[:at].rstrip(), context[at:].lstrip()
    return (before + "\n" if before else "") + needle + ("\n" + after if after else "")


def _fit(
    make: Callable[[int, int], tuple[int, str]], stops: Sequence[int], depth: float, length: int, guess: int
) -> str:
    """The text that has ``length`` tokens, or the longest that fits where none is exact.

    ``make`` builds a text from a cut of the haystack and the needle's place, in characters. The estimated cut is
    corrected by its error in tokens; then, with the needle's place held, it moves character by character.
    """
    best, tried, tokens = (0, ""), set[int](), min(guess, len(stops))
    while tokens not in tried:
        tried.add(tokens)
        cut, inside = stops[tokens - 1], int(tokens * depth / 100)
        target = cut if depth >= 100 else stops[inside - 1] if inside else 0
        found, text = make(cut, target)
        if found == length:
            return text
        best = max(best, (found, text)) if found < length else best
        tokens = min(max(tokens + length - found, 1), len(stops))
    for step in (step for size in range(1, 25) for step in (size, -size)):
        moved = max(cut + step, 1)
        found, text = make(moved, moved if depth >= 100 else min(target, moved))
        if found == length:
            return text
        best = max(best, (found, text)) if found < length else best
    if not best[0]:
        raise HeadscopeError(f"the haystack cannot be cut so that the prompt has {length} tokens; use another length")
    return best[1]


def _located(tokenizer: Any, needle: Needle, question: str, text: str) -> NeedlePrompt:
    if text.count(needle.needle) != 1:
        raise HeadscopeError(
            f"needle {needle.name!r} stands {text.count(needle.needle)} times in its prompt instead of once: "
            "the chat template changes it, or the haystack tells it"
        )
    ids, offsets = encode(tokenizer, text)
    at = text.index(needle.needle)
    whole = span_in(tokenizer, text, ids, offsets, needle.needle, start=at)
    answer = span_in(tokenizer, text, ids, offsets, needle.real_needle, start=at)
    asked = None
    with suppress(HeadscopeError):  # a question that the chat template or the tokenizer changes has no span
        asked = span_in(tokenizer, text, ids, offsets, question, start=max(0, text.rfind(question)))
    return NeedlePrompt(needle, text, tuple(ids), answer, whole, asked)
