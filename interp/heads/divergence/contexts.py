"""A prompt with and without one of its named spans: what the methods of this family run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Measured, Text, per_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.documents import bundled_questions
from headscope.interp.prompts.look import is_table, sample_of
from headscope.interp.prompts.needle import BASE, CHAT
from headscope.interp.prompts.sequences import Sample
from headscope.interp.prompts.spans import encode, span_in
from headscope.interp.prompts.vision import VisionPrompt
from headscope.interp.sites.inputs import media_tokens
from headscope.interp.sites.unwrap import bare_model
from headscope.interp.statistics.spans import Span

Context = tuple[Sample, Sample]  # a prompt, and the same without the span


@dataclass(frozen=True, kw_only=True)
class ContextMethod(Measured):
    """Base of the methods that read a prompt twice: as it is, and without the tokens of a named span.

    The tokens are taken out, not masked: what follows moves up. Pictures go with their tokens.

    Args:
        span: which span is taken out, any that the prompts publish.
        prompts: prompts with named spans, one chat each, as ``vision_prompt`` makes them (with images or without), or
            ``VisionPrompt(inputs, spans)`` of your own.
        samples: prompts to measure.
    """

    samples: int = 10
    span: str = "document"
    prompts: Sequence[VisionPrompt] | None = None

    def made(self, lm: LanguageModel) -> list[VisionPrompt]:
        """The prompts where none are given."""
        raise NotImplementedError

    def prepare(self, lm: LanguageModel) -> list[Sample]:
        return [context[0] for context in self.contexts(lm)]

    def views(self, lm: LanguageModel, sample: Sample) -> tuple[Sample, ...]:
        """With the span, and without it."""
        return self.contexts(lm)[sample.trial["sample"]]

    def contexts(self, lm: LanguageModel) -> list[Context]:
        """Both prompts of every sample."""

        def make() -> list[Context]:
            given = self.made(lm) if self.prompts is None else list(self.prompts)[: self.samples]
            if not given:
                raise HeadscopeError("no prompt was given: pass at least one")
            return [_context(lm, i, prompt, self.span) for i, prompt in enumerate(given)]

        return per_model(self, lm, make)

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        held = super().parameters(lm)
        if self.prompts is None:
            return held
        return {**held, "prompts": self.digest(lm), **({"texts": None} if "texts" in held else {})}

    def digest(self, lm: LanguageModel) -> str:
        """A hash of all prompts, their pictures included."""
        keys = "|".join(str(with_span.key) for with_span, _ in self.contexts(lm))
        return hashlib.sha256(keys.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class DocumentContext(ContextMethod):
    """Base of those that read a document, a question about it, and "Answer:", unless prompts are given.

    Args:
        span: "document" of the prompts made here; any that ``prompts`` publish.
        texts: documents for the prompts made here (by default passages of the bundled prose with a needle in each).
        question: what is asked about ``texts``.
        length: tokens of a bundled document, which ends with the sentence that they end in.
        samples: prompts to measure; for the prompts made here there are ten bundled needles.
    """

    texts: Text | None = None
    question: str = "What is this about?"
    length: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None and self.texts is not None:
            raise HeadscopeError("prompts hold their documents already: give prompts or texts")

    def made(self, lm: LanguageModel) -> list[VisionPrompt]:
        """A chat, or a plain text, for each document."""
        if self.texts is None:
            asked = bundled_questions(lm, self.samples, 1, self.length)
            pairs = [(one.documents[0], one.question) for one in asked]
        else:
            texts = [self.texts] if isinstance(self.texts, str) else self.texts
            pairs = [(text, self.question) for text in texts][: self.samples]
        return [_document(lm, *pair) for pair in pairs]


def without(sample: Sample, spans: Sequence[Span], media: Mapping[str, int]) -> Sample:
    """A sample without the tokens of ``spans``; ``media`` are the token ids where pictures and the like stand.

    Raises:
        HeadscopeError: a span that holds some pictures of a prompt and leaves others, whose inputs nobody can part.
    """
    length = len(sample.ids)
    keep = torch.ones(length, dtype=torch.bool)
    for first, stop in spans:
        keep[first : min(stop, length)] = False
    tokens = torch.tensor(sorted(set(media.values())), dtype=sample.ids.dtype)
    of_media = torch.isin(sample.ids, tokens)
    left, gone = bool((of_media & keep).any()), bool((of_media & ~keep).any())
    pictures = {name: x for name, x in sample.inputs.items() if not is_table(x, length)}
    if left and gone and pictures:
        raise HeadscopeError("the span holds some of the prompt's pictures and not others; take out all, or none")
    tables = {name: x[:, keep.to(x.device)] for name, x in sample.inputs.items() if name not in pictures}
    return Sample(sample.trial, sample.ids[keep], tables if gone else {**tables, **pictures})


def _context(lm: LanguageModel, index: int, prompt: VisionPrompt, name: str) -> Context:
    whole = sample_of(lm, index, prompt)
    if name not in prompt.spans:
        raise HeadscopeError(f"prompt {index} has no span {name!r}: it has {', '.join(prompt.spans) or 'none'}")
    count = len(whole.ids)
    spans = [(first, min(stop, count)) for first, stop in prompt.spans[name][0] if first < count]
    if not spans:
        raise HeadscopeError(f"prompt {index} holds nothing in its span {name!r}")
    whole = replace(whole, trial={"sample": index, "span": name, "removed": [list(span) for span in spans]})
    rest_of = without(whole, spans, media_tokens(bare_model(lm).config))
    if not len(rest_of.ids):
        raise HeadscopeError(f"the span {name!r} is all of prompt {index}: nothing is left to compare it with")
    return whole, rest_of


def _document(lm: LanguageModel, document: str, question: str) -> VisionPrompt:
    """A document and a question about it, as the needle prompts ask."""
    if getattr(lm.tokenizer, "chat_template", None):
        text = lm.chat(CHAT.format(context=document, question=question))
    else:
        text = BASE.format(context=document, question=question)
    ids, offsets = encode(lm.tokenizer, text)
    span = span_in(lm.tokenizer, text, ids, offsets, document)
    return VisionPrompt({"input_ids": torch.tensor([ids])}, {"document": [[span]]})
