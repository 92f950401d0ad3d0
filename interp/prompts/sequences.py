"""What the discovery methods let a model read: random tokens, repeated random tokens, natural text; and which key of a
sequence each query should look at.

A table of keys is an int64 tensor (length,): for each query position a key position, -1 where the query has none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.tokens import body_tokens, bos_tokens, check_length, random_tokens, start_tokens
from headscope.interp.runs.journal import Trial

PROSE = "haystack.txt"  # the bundled natural text, in headscope/interp/data


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence: ``ids`` (length,) its tokens, ``trial`` its description in JSON (``trial["sample"]`` its index),
    ``inputs`` what the model takes beside them, such as pictures, as for a batch of one."""

    trial: Trial
    ids: Tensor
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def key(self) -> tuple[int | str, ...]:
        """Equal for samples that are run alike: the tokens, and a hash of other inputs."""
        if not self.inputs:
            return tuple(self.ids.tolist())
        digest = hashlib.sha256()
        for name, x in sorted(self.inputs.items()):
            digest.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
            digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return (*self.ids.tolist(), digest.hexdigest())

    @property
    def shape(self) -> tuple[int | str | tuple[int, ...], ...]:
        """Equal for samples that fit in one batch."""
        return (len(self.ids), *(x for name in sorted(self.inputs) for x in (name, tuple(self.inputs[name].shape))))


def random_samples(lm: LanguageModel, length: int, samples: int, seed: int) -> list[Sample]:
    """``samples`` sequences of ``length`` different random tokens and nothing else, each from a seed of its own."""
    check_length(lm, length)
    return [
        Sample({"sample": i, "input": "random"}, random_tokens(lm, length, [seed, i])) for i in range(_count(samples))
    ]


def repeated_samples(lm: LanguageModel, length: int, samples: int, seed: int, *, bos: bool) -> list[Sample]:
    """``samples`` sequences of ``length`` different random tokens and the same again, behind BOS where ``bos``."""
    if length < 2:
        raise HeadscopeError(f"length={length} is too short to repeat: take at least 2 random tokens")
    prefix = bos_tokens(lm) if bos else []
    check_length(lm, 2 * length + len(prefix))
    found = []
    for i in range(_count(samples)):
        ids = random_tokens(lm, length, [seed, i])
        found.append(Sample({"sample": i, "input": "repeated"}, torch.cat([torch.tensor(prefix).long(), ids, ids])))
    return found


def text_samples(lm: LanguageModel, text: str | Sequence[str], window: int, samples: int) -> list[Sample]:
    """Consecutive windows of ``window`` tokens, each behind the special tokens that the tokenizer puts before a text.

    Several texts take turns: every text's first window, then every second one. ``samples`` limits the windows; a rest
    shorter than a window is left out. ``trial["text"]`` is the text's index, ``trial["first"]`` its first token there.

    Raises:
        HeadscopeError: no text, a text shorter than ``window`` tokens, or a window longer than the model's context.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise HeadscopeError("no text was given: pass a string or a list of strings")
    check_length(lm, window)
    prefix = start_tokens(lm)
    if window < len(prefix) + 2:
        raise HeadscopeError(f"a window of {window} tokens is too short: take at least {len(prefix) + 2}")
    step, found = window - len(prefix), []
    for index, body in enumerate(body_tokens(lm, one) for one in texts):
        if len(body) < step:
            raise HeadscopeError(
                f"text {index} has {len(body) + len(prefix)} tokens, fewer than the {window} to be read: "
                "give longer texts or ask for fewer tokens"
            )
        starts = range(0, len(body) - step + 1, step)
        found += [(turn, index, first, prefix + body[first : first + step]) for turn, first in enumerate(starts)]
    found = sorted(found, key=lambda one: one[:2])[: _count(samples)]
    return [
        Sample({"sample": i, "input": "text", "text": index, "first": first}, torch.tensor(ids))
        for i, (_, index, first, ids) in enumerate(found)
    ]


def one_token_samples(lm: LanguageModel, length: int, samples: int, seed: int) -> list[Sample]:
    """``samples`` sequences of one random token ``length`` times, without BOS."""
    check_length(lm, length)
    drawn = random_samples(lm, 1, samples, seed)
    return [Sample({**one.trial, "input": "repeat"}, one.ids.repeat(length)) for one in drawn]


def first_windows(lm: LanguageModel, texts: str | Sequence[str] | None, length: int, samples: int) -> list[Sample]:
    """The first ``length`` tokens of each text, at most ``samples``; None: passages of the bundled prose."""
    check_length(lm, length)
    given = bundled_passages(lm, length, samples) if texts is None else [texts] if isinstance(texts, str) else texts
    return text_samples(lm, given, length, min(samples, max(1, len(given))))


def bundled_passages(lm: LanguageModel, length: int, samples: int) -> list[str]:
    """Up to ``samples`` passages of the bundled prose: whole paragraphs, joined until they have ``length`` tokens."""
    file = resources.files("headscope.interp") / "data" / PROSE
    if not file.is_file():
        raise HeadscopeError(f"the bundled text data/{PROSE} is not installed: pass texts of your own")
    paragraphs = re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))
    return list(islice(joined(lm, paragraphs, length), samples))


def joined(lm: LanguageModel, texts: Iterable[str], length: int) -> Iterator[str]:
    """Texts joined by empty lines, in order, until each has ``length`` tokens; what is left over at the end is not
    enough for another one.
    """
    held, needed = "", length - len(start_tokens(lm))
    for text in texts:
        held = f"{held}\n\n{text}".strip()
        if held and len(body_tokens(lm, held)) >= needed:
            yield held
            held = ""


def _count(samples: int) -> int:
    if samples < 1:
        raise HeadscopeError(f"samples={samples}: ask for at least 1")
    return samples


def previous_occurrence(ids: Tensor) -> Tensor:
    """The most recent earlier position of each query's own token, as a table of keys."""
    seen: dict[int, int] = {}
    table = []
    for position, token in enumerate(ids.tolist()):
        table.append(seen.get(token, -1))
        seen[token] = position
    return torch.tensor(table, dtype=torch.long)


def after_previous_occurrence(ids: Tensor) -> Tensor:
    """The position after the most recent earlier one of each query's token, as a table of keys.

    A token that directly follows itself has none: the position after its earlier occurrence is the query's own.
    """
    previous = previous_occurrence(ids)
    after = previous + 1
    return torch.where((previous >= 0) & (after < torch.arange(len(ids))), after, -1)


def position_before(ids: Tensor) -> Tensor:
    """The position before each query, as a table of keys; the first query has none."""
    return torch.arange(len(ids)) - 1


def other_keys(table: Tensor, seed: Sequence[int]) -> Tensor:
    """A table of random keys: each query that has a key in ``table`` is given another one among 0 to its own position,
    each as likely, or none where there is no other."""
    queries = torch.arange(len(table))
    drawn = torch.from_numpy(np.random.default_rng(list(seed)).random(len(table)))
    found = (drawn * queries).long()  # one of as many keys as there are without the query's own key in the table
    found = torch.where(found >= table, found + 1, found)
    return torch.where((table >= 0) & (queries > 0), found, -1)
