"""Named token spans: which tokens of a text a word, sentence or needle became.

A span is ``(first, stop)``: token positions counted from the example's first token, ``stop`` excluded, as ``SpanMass``
takes them. A statistic takes one pair for all examples, one pair an example, or, where something stands in several
places (an image in rows), one list of pairs an example.

Spans come from the tokenizer's own character offsets, or, where it has none, from decoding: never from comparing bags
of token ids, which can be off by one (Wu et al. 2024's code takes any window with 90 % of the needle's ids). Spans
of a chat with images: ``headscope.interp.prompts.vision``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.spans import Span, Spans


def find_span(ids: Sequence[int], part: Sequence[int], *, start: int = 0) -> Span:
    """The first place at or after ``start`` where the token ids ``part`` stand in ``ids``, exactly and in order.

    Raises:
        HeadscopeError: ``part`` is empty, or does not occur.
    """
    whole, wanted = list(ids), list(part)
    if not wanted:
        raise HeadscopeError("the tokens to find are empty; give at least one token id")
    for first in range(start, len(whole) - len(wanted) + 1):
        if whole[first : first + len(wanted)] == wanted:
            return first, first + len(wanted)
    raise HeadscopeError(
        f"{len(wanted)} tokens do not occur in these {len(whole)}: a text is tokenized differently in its context; "
        "find it as text with text_span, or check that it was not truncated"
    )


def text_span(
    tokenizer: Any, text: str, part: str, *, start: int = 0, limit: int | None = None, special_tokens: bool = True
) -> Span:
    """The tokens of ``text`` that hold ``part``: every token with at least one character of it.

    Args:
        tokenizer: a Hugging Face tokenizer, fast or not.
        text: the whole prompt, as it is given to the tokenizer.
        part: a piece of ``text``; its first occurrence at or after character ``start`` is meant.
        limit: tokens that are kept of the prompt; a span that reaches beyond was truncated away.
        special_tokens: whether the prompt is tokenized with the tokenizer's special tokens.

    Raises:
        HeadscopeError: ``part`` is not in ``text``, does not survive tokenization (unknown tokens, or characters that
            the tokenizer drops), or lies beyond ``limit``.
    """
    ids, offsets = encode(tokenizer, text, special_tokens=special_tokens)
    return span_in(tokenizer, text, ids, offsets, part, start=start, limit=limit)


def named_spans(tokenizer: Any, text: str, parts: Mapping[str, str], **options: Any) -> Spans:
    """The span of every named part of ``text``; ``options`` and errors as of ``text_span``."""
    ids, offsets = encode(tokenizer, text, special_tokens=options.pop("special_tokens", True))
    return {name: span_in(tokenizer, text, ids, offsets, part, **options) for name, part in parts.items()}


def encode(tokenizer: Any, text: str, *, special_tokens: bool = True) -> tuple[list[int], list[tuple[int, int]] | None]:
    """Token ids of ``text``, not truncated, and their character offsets (None for a tokenizer that has none)."""
    options = {"add_special_tokens": special_tokens, "truncation": False, "verbose": False}
    if not getattr(tokenizer, "is_fast", False):
        return list(tokenizer(text, **options)["input_ids"]), None
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]


def span_in(
    tokenizer: Any,
    text: str,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]] | None,
    part: str,
    *,
    start: int = 0,
    limit: int | None = None,
) -> Span:
    """``text_span`` on what ``encode`` returned, for several parts of one text."""
    at = text.find(part, start) if part else -1
    if at < 0:
        raise HeadscopeError(f"{_short(part)} does not occur in the text; check its spelling and white space")
    if offsets is not None:
        span = by_offsets(offsets, at, at + len(part))
    else:
        span = _by_decoding(tokenizer, list(ids), part)
    if span is None or not _survives(tokenizer, list(ids[span[0] : span[1]]), part):
        raise HeadscopeError(
            f"{_short(part)} does not survive tokenization by {type(tokenizer).__name__} (unknown or dropped "
            "characters); word it with characters of the tokenizer's vocabulary"
        )
    if limit is not None and span[1] > limit:
        raise HeadscopeError(
            f"{_short(part)} is at tokens {span[0]} to {span[1]} and the text is cut at {limit}: "
            "shorten the text before it"
        )
    return span


def by_offsets(offsets: Sequence[tuple[int, int]], first: int, stop: int) -> Span | None:
    """The tokens with at least one of the characters ``first`` to ``stop``, from each token's own; None without any."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > first and a < b]
    return (inside[0], inside[-1] + 1) if inside else None


def _by_decoding(tokenizer: Any, ids: list[int], part: str) -> Span | None:
    """The tightest tokens whose decoding contains ``part``: the shortest prefix, then the shortest tail of that."""

    def holds(first: int, stop: int) -> bool:
        return _letters(part) in _letters(_decode(tokenizer, ids[first:stop]))

    if not holds(0, len(ids)):
        return None
    low, high = 1, len(ids)  # the least stop that holds; containment only grows with stop
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(0, middle) else (middle + 1, high)
    stop = low
    low, high = 0, stop - 1  # the greatest first that holds
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle, stop) else (low, middle - 1)
    return low, stop


def _survives(tokenizer: Any, ids: list[int], part: str) -> bool:
    unknown = getattr(tokenizer, "unk_token_id", None)
    end = getattr(tokenizer, "eos_token_id", None)
    if unknown is not None and unknown != end and unknown in ids:
        return False
    return _letters(part) in _letters(_decode(tokenizer, ids))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _letters(text: str) -> str:
    """The text without case, accents and white space, which tokenizers may normalise; everything, if only those."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in plain if not c.isspace() and not unicodedata.combining(c)) or text


def _short(part: str) -> str:
    return repr(part if len(part) <= 60 else part[:57] + "...")
