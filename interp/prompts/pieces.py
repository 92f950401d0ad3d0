"""A prompt put together from pieces, some with a name: its tokens, and the span of every named piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.boundary import prompt_boundary
from headscope.interp.prompts.documents import around
from headscope.interp.prompts.spans import by_offsets, encode
from headscope.interp.prompts.tokens import body_tokens, check_length, start_tokens
from headscope.interp.statistics.spans import Span, published_spans

Piece = tuple[str | None, str]  # its name, or None, and its text, with the space before it


@dataclass(frozen=True, eq=False)
class TextPrompt:
    """``ids`` are the tokens of ``text``, the special ones before it included; ``spans`` hold the named pieces, as
    (first, stop) in ``ids``."""

    text: str
    ids: tuple[int, ...]
    spans: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def published(self) -> Iterator[None]:
        """Inside the block its spans may be named, and its end is known."""
        with published_spans(self.spans), prompt_boundary(len(self.ids)):
            yield

    def covering(self, name: str, parts: Sequence[str]) -> TextPrompt:
        """The same prompt with one more span, ``name``: from the first to the end of the last of ``parts``."""
        found = [self.spans[part] for part in parts]
        return TextPrompt(self.text, self.ids, {**self.spans, name: (found[0][0], found[-1][1])})


def assembled(
    lm: LanguageModel, pieces: Sequence[Piece], cue: str = "", *, chat: bool = False, room: int = 0
) -> TextPrompt:
    """The prompt of the pieces one after another, and ``cue``, the answer's beginning.

    A token belongs to every piece that it has a character of, but to the earlier of two named ones: documents without a
    gap between them have spans without one.

    Args:
        chat: the pieces are a user's words, and the cue begins the assistant's turn.
        room: tokens that have to fit after the prompt.

    Raises:
        HeadscopeError: a tokenizer that does not say which characters a token holds, a named piece that became no
            token of its own, a prompt that does not fit, or a chat template that is missing or changes the words.
    """
    before, after = around(lm) if chat else ("", "")
    if chat and not after:
        raise HeadscopeError(f"{lm.name} has no chat template: leave chat out, or take an instruction-tuned model")
    text = before + "".join(part for _, part in pieces) + after + cue
    body, offsets = encode(lm.required_tokenizer(), text, special_tokens=False)
    if offsets is None:
        raise HeadscopeError(f"{lm.name} has no fast tokenizer, so nobody knows which tokens a piece of text became")
    start = start_tokens(lm)
    ids = (*start, *body)
    check_length(lm, len(ids) + room)
    spans: dict[str, Span] = {}
    at, taken = len(before), 0
    for name, part in pieces:
        if name is not None:
            found = by_offsets(offsets, at, at + len(part))
            first, stop = (0, 0) if found is None else (max(found[0], taken), found[1])
            if first >= stop:
                raise HeadscopeError(f"the piece {name!r} of a prompt became no token of its own: {part!r:.60}")
            spans[name], taken = (first + len(start), stop + len(start)), stop
        at += len(part)
    return TextPrompt(text, ids, spans)


def continuation(lm: LanguageModel, prompt: TextPrompt, text: str) -> list[int]:
    """The tokens that ``text`` becomes behind a prompt.

    Both are tokenized as one text, as lm-evaluation-harness does. Where that changes the prompt's own tokens, ``text``
    is tokenized alone, so that the prompt stays what it is.

    Raises:
        HeadscopeError: a text without tokens.
    """
    start = len(start_tokens(lm))
    whole = body_tokens(lm, prompt.text + text)
    own = list(prompt.ids[start:])
    found = whole[len(own) :] if whole[: len(own)] == own else body_tokens(lm, text)
    if not found:
        raise HeadscopeError(f"{text!r:.60} became no token behind its prompt; give another text")
    return found
