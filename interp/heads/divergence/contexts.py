"""A prompt with and without one of its named spans: what the methods of this family run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Measured, Text, per_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.documents import bundled_questions
from headscope.interp.prompts.needle import BASE, CHAT
from headscope.interp.prompts.sequences import Sample
from headscope.interp.prompts.spans import encode, span_in
from headscope.interp.prompts.tokens import check_length
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
        span: which span is taken out: "document" of the prompts made here; any that ``prompts`` publish.
        prompts: prompts with named spans, one chat each, as ``vision_prompt`` makes them (with images or without), or
            ``VisionPrompt(inputs, spans)`` of your own. By default a document, a question, and "Answer:".
        texts: documents for the prompts made here (by default passages of the bundled prose with a needle in each).
        question: what is asked about ``texts``.
        length: tokens of a bundled document, which ends with the sentence that they end in.
        samples: prompts to measure; for the prompts made here there are ten bundled needles.
    """

    samples: int = 10
    span: str = "document"
    prompts: Sequence[VisionPrompt] | None = None
    texts: Text | None = None
    question: str = "What is this about?"
    length: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts is not None and self.texts is not None:
            raise HeadscopeError("prompts hold their documents already: give prompts or texts")

    def prepare(self, lm: LanguageModel) -> list[Sample]:
        return [context[0] for context in self.contexts(lm)]

    def views(self, lm: LanguageModel, sample: Sample) -> tuple[Sample, ...]:
        """With the span, and without it."""
        return self.contexts(lm)[sample.trial["sample"]]

    def contexts(self, lm: LanguageModel) -> list[Context]:
        """Both prompts of every sample."""

        def make() -> list[Context]:
            given = self._documents(lm) if self.prompts is None else list(self.prompts)[: self.samples]
            if not given:
                raise HeadscopeError("no prompt was given: pass at least one")
            return [_context(lm, i, prompt, self.span) for i, prompt in enumerate(given)]

        return per_model(self, lm, make)

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        held = super().parameters(lm)
        if self.prompts is None:
            return held
        keys = "|".join(str(with_span.key) for with_span, _ in self.contexts(lm))
        return {**held, "prompts": hashlib.sha256(keys.encode()).hexdigest(), "texts": None}

    def _documents(self, lm: LanguageModel) -> list[VisionPrompt]:
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
    pictures = {name: x for name, x in sample.inputs.items() if not _is_table(x, length)}
    if left and gone and pictures:
        raise HeadscopeError("the span holds some of the prompt's pictures and not others; take out all, or none")
    tables = {name: x[:, keep.to(x.device)] for name, x in sample.inputs.items() if name not in pictures}
    return Sample(sample.trial, sample.ids[keep], tables if gone else {**tables, **pictures})


def _context(lm: LanguageModel, index: int, prompt: VisionPrompt, name: str) -> Context:
    ids = prompt.inputs["input_ids"]
    if ids.shape[0] != 1:
        raise HeadscopeError(
            f"prompt {index} holds {ids.shape[0]} chats, whose pictures nobody can part: give one each"
        )
    if name not in prompt.spans:
        raise HeadscopeError(f"prompt {index} has no span {name!r}: it has {', '.join(prompt.spans) or 'none'}")
    mask = prompt.inputs.get("attention_mask")
    real = torch.ones_like(ids[0], dtype=torch.bool) if mask is None else mask[0].bool()
    rest = {n: x for n, x in prompt.inputs.items() if n not in ("input_ids", "attention_mask")}
    inputs = {n: x[:, real] if _is_table(x, ids.shape[1]) else x for n, x in rest.items()}
    own = ids[0][real].cpu()
    check_length(lm, len(own))
    spans = [(first, min(stop, len(own))) for first, stop in prompt.spans[name][0] if first < len(own)]
    if not spans:
        raise HeadscopeError(f"prompt {index} holds nothing in its span {name!r}")
    trial = {"sample": index, "span": name, "removed": [list(span) for span in spans]}
    whole = Sample(trial, own, inputs)
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


def _is_table(x: Tensor, length: int) -> bool:
    """Whether an input has one value a token."""
    return tuple(x.shape[:2]) == (1, length)
