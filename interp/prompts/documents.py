"""Numbered documents and a question about them, as QRHead asks it (Zhang et al. 2025, arXiv 2506.09944)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.prompts.haystack import insertion_point, load_needles, sentence_ends
from headscope.interp.prompts.spans import by_offsets, encode
from headscope.interp.prompts.tokens import body_tokens, check_length
from headscope.interp.statistics.spans import Span

INSTRUCTION = " Here are some paragraphs:"
LATE = "Please find information that are relevant to the following query in the paragraphs above."
SEPARATOR = " \n\n"  # the authors' for Llama's vocabulary
_ASKED = "\ue000"  # a private-use character: where a chat template puts the user's words


@dataclass(frozen=True)
class Question:
    """A question, its documents, and which of them hold the answer."""

    question: str
    documents: tuple[str, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class DocumentPrompt:
    """One prompt: ``ids``, each document's tokens ``documents``, and ``query``, the tokens from the late instruction to
    the end of the prompt."""

    ids: tuple[int, ...]
    documents: tuple[Span, ...]
    query: Span


def document_prompt(lm: LanguageModel, documents: Sequence[str], query: str) -> DocumentPrompt:
    """The prompt that asks for what is relevant to ``query``, through the chat template if there is one.

    Raises:
        HeadscopeError: a tokenizer that does not say which characters a token holds, or too long a prompt.
    """
    before, after = around(lm)
    text, places = before + INSTRUCTION, []
    for number, document in enumerate(documents, 1):
        text += SEPARATOR
        places.append((len(text), len(text) + len(whole := f"[{number}] {document}")))
        text += whole
    text += SEPARATOR
    asked = len(text)
    text += f"{LATE}{SEPARATOR}Query: {query}{after}"
    ids, offsets = encode(lm.tokenizer, text)
    if offsets is None:
        raise HeadscopeError(f"{lm.name} has no fast tokenizer, so nobody knows which tokens a document became")
    check_length(lm, len(ids))
    spans = [by_offsets(offsets, *place) for place in (*places, (asked, len(text)))]
    found = [span for span in spans if span is not None]
    if len(found) < len(spans):
        raise HeadscopeError("a document or the query became no token; give texts of the tokenizer's characters")
    return DocumentPrompt(tuple(ids), tuple(found[:-1]), found[-1])


def load_questions(path: str | Path) -> list[Question]:
    """Questions in the authors' form, a JSON list of {"question", "paragraphs": [{"idx", "paragraph_text", "title"}],
    "gt_docs": [idx]}; a title stands on a line before its text.

    Raises:
        HeadscopeError: no such file, another form, or a gold document that is not among the paragraphs.
    """
    try:
        return [_question(one) for one in json.loads(Path(path).read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeadscopeError(
            f"{path} holds no questions ({type(error).__name__}: {error}); give a JSON list of objects with question, "
            "paragraphs (idx, paragraph_text) and gt_docs"
        ) from error


def bundled_questions(lm: LanguageModel, samples: int, documents: int, length: int) -> list[Question]:
    """Questions about bundled needles, each set into one of ``documents`` passages of the bundled prose: whole
    sentences, ``length`` tokens and the rest of the last one. Every question has passages of its own as far as there
    are, and its gold document another place.

    Raises:
        HeadscopeError: more questions than bundled needles, or no passage of that length.
    """
    needles = load_needles(samples)
    passages = sequences.bundled_passages(lm, length, samples * documents)
    if len(passages) < documents:
        raise HeadscopeError(f"the bundled prose has {len(passages)} passages of {length} tokens; ask for shorter ones")
    found = []
    for i, needle in enumerate(needles):
        own = [_cut(lm, passages[(i * documents + j) % len(passages)], length) for j in range(documents)]
        gold = i % documents
        at = insertion_point(own[gold], len(own[gold]) // 2)
        own[gold] = f"{own[gold][:at].rstrip()} {needle.needle} {own[gold][at:].lstrip()}".strip()
        found.append(Question(needle.question, tuple(own), (gold,)))
    return found


def _cut(lm: LanguageModel, text: str, length: int) -> str:
    """The sentences of a text until they have ``length`` tokens."""
    return next((text[:end] for end in sentence_ends(text) if len(body_tokens(lm, text[:end])) >= length), text)


def _question(held: Mapping[str, Any]) -> Question:
    texts, names = [], []
    for one in held["paragraphs"]:
        text = str(one["paragraph_text"]).strip()
        texts.append(text if one.get("title") is None else f"{one['title']}\n{text}")
        names.append(one["idx"])
    return Question(str(held["question"]), tuple(texts), tuple(names.index(gold) for gold in held["gt_docs"]))


def around(lm: LanguageModel) -> tuple[str, str]:
    """What the chat template writes before and after a user's words; nothing without one."""
    if not getattr(lm.tokenizer, "chat_template", None):
        return "", ""
    before, found, after = lm.chat(_ASKED).partition(_ASKED)
    if not found:
        raise HeadscopeError(f"the chat template of {lm.name} changes the user's words, so their tokens cannot be told")
    return before, after
