"""Pairs of prompts that differ in one respect, token by token, and the number that is read off after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_counts
from headscope.interp.sites import attached
from headscope.interp.sites.unwrap import bare_model, takes
from headscope.interp.statistics.spans import Span, by_example, members
from headscope.probes.lenses.targets import Token, token_ids

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@dataclass(frozen=True, eq=False)
class Pairs:
    """``clean`` and ``corrupt`` prompts as token ids (example, token), padded on the right, the same length in a pair.

    ``lengths`` (example,) counts real tokens. ``answers`` and ``others`` (example,) are the tokens that the metric
    compares, after both prompts of a pair alike: the answer to the clean one, and (usually) that to the corrupt one.
    ``groups`` (example,) names prompts of one template, whose tokens mean the same position by position; a mean
    over prompts is taken within a group. ``spans`` names positions, by example, as statistics take them.
    """

    clean: Tensor
    corrupt: Tensor
    lengths: Tensor
    answers: Tensor
    others: Tensor
    groups: Tensor
    spans: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("clean", "corrupt", "lengths", "answers", "others", "groups"):
            given, dims = getattr(self, name), 2 if name in ("clean", "corrupt") else 1
            if not isinstance(given, Tensor) or given.dim() != dims or given.dtype not in _WHOLE:
                raise HeadscopeError(f"{name} of pairs is a tensor of whole numbers with {dims} dimensions")
            if bool((given < 0).any()):
                raise HeadscopeError(f"{name} of pairs has a number below 0")
        sizes = {len(x) for x in (self.clean, self.corrupt, self.lengths, self.answers, self.others, self.groups)}
        if len(sizes) != 1 or self.clean.shape != self.corrupt.shape or not len(self.clean):
            raise HeadscopeError(
                "pairs need as many clean as corrupt prompts, answers, others and groups, and at least one"
            )
        width = self.clean.shape[1]
        if not 1 <= int(self.lengths.min()) <= int(self.lengths.max()) <= width:
            raise HeadscopeError(f"lengths of pairs are 1 to {width}, the tokens of the longest prompt")

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        clean: Sequence[str],
        corrupt: Sequence[str],
        answers: Sequence[Token],
        others: Sequence[Token],
        groups: Sequence[int] | None = None,
        spans: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    ) -> Pairs:
        """Pairs of texts; an answer is one token, an id or a string (mind its leading space).

        Args:
            lm: load_model's result, or what load_model takes, with a tokenizer.
            groups: a whole number from 0 on for each pair, the same for prompts of one template.

        Raises:
            HeadscopeError: no tokenizer, a pair whose prompts differ in their number of tokens, an answer that is not
                one token of the vocabulary, or groups that are not one whole number a pair.
        """
        lm = load_model(lm)
        count = len(clean)
        if not count or any(len(x) != count for x in (corrupt, answers, others)):
            raise HeadscopeError(f"give one corrupt prompt, answer and other a clean prompt: {count} clean prompts")
        texts = lm.encode([*clean, *corrupt])
        ids, lengths = texts["input_ids"].cpu(), texts["attention_mask"].sum(1).cpu()
        for i, (n, m) in enumerate(zip(lengths[:count].tolist(), lengths[count:].tolist(), strict=True)):
            if n != m:
                raise HeadscopeError(
                    f"pair {i} does not align: {n} tokens clean, {m} corrupt; choose words of as many tokens"
                )
        one, other = (torch.tensor(_answer_ids(lm, tokens)) for tokens in (answers, others))
        named = [0] * count if groups is None else list(groups)
        if len(named) != count or not all(isinstance(x, int | np.integer) and x >= 0 for x in named):
            raise HeadscopeError(
                f"give one group a pair, a whole number from 0 on: {count} pairs, groups {named!r:.60}"
            )
        group = torch.tensor([int(x) for x in named])
        return cls(ids[:count], ids[count:], lengths[:count], one, other, group, spans or {})

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def real(self) -> Tensor:
        """Which entries are tokens, not padding: bool (example, token)."""
        return torch.arange(self.clean.shape[1]) < self.lengths[:, None]

    @property
    def texts(self) -> list[str]:
        """The prompts' ids as text, to be hashed."""
        rows = torch.cat([self.clean, self.corrupt]).tolist()
        return [" ".join(map(str, row[:n])) for row, n in zip(rows, self.lengths.tolist() * 2, strict=True)]

    def part(self, rows: slice | Sequence[int]) -> Pairs:
        """Some of the pairs."""
        index = torch.arange(len(self))[rows]
        names = ("clean", "corrupt", "lengths", "answers", "others", "groups")
        spans = {name: [span[i] for i in index.tolist()] for name, span in self.spans.items()}
        return replace(self, **{name: getattr(self, name)[index] for name in names}, spans=spans)

    def batches(self, size: int) -> list[Pairs]:
        """The pairs in batches of at most ``size``.

        Raises:
            HeadscopeError: a size below 1.
        """
        check_counts(1, batch_size=size)
        return [self.part(slice(first, first + size)) for first in range(0, len(self), size)]

    def where(self, positions: Any = None) -> Tensor:
        """Which tokens ``positions`` mean: bool (example, token).

        None: all; a number: one, from the prompt's end if negative; a name of ``spans``; a span (first, stop), or one
        an example, counted from the example's first token; what this returned, for these pairs, stands for itself.

        Raises:
            HeadscopeError: no such span, one that reaches beyond its prompt, or a prompt in which nothing is meant.
        """
        at, real = torch.arange(self.clean.shape[1]).expand(len(self), -1), self.real
        if positions is None:
            return real
        if isinstance(positions, Tensor) and positions.dtype == torch.bool and positions.shape == real.shape:
            return positions
        if isinstance(positions, str):
            if positions not in self.spans:
                raise HeadscopeError(f"no span is called {positions!r}; these pairs have {list(self.spans)}")
            positions = [tuple(span) for span in self.spans[positions]]
        if isinstance(positions, int):
            held = at == (self.lengths[:, None] + positions if positions < 0 else positions)
        else:
            held = members(positions, at, len(self))
            self._check_within(by_example(positions))
        held = (held & real).expand(len(self), -1)
        if not bool(held.any(1).all()):
            raise HeadscopeError(f"positions {positions!r:.60} are not in every prompt; give those of each example")
        return held

    def _check_within(self, rows: list[list[Span]]) -> None:
        lengths = self.lengths.tolist()
        for i, (row, length) in enumerate(zip(rows * len(lengths) if len(rows) == 1 else rows, lengths, strict=True)):
            if beyond := [span for span in row if span[1] > length]:
                raise HeadscopeError(
                    f"positions {beyond[0]} reach beyond prompt {i} of {length} tokens; give a span that is within it"
                )


def _answer_ids(lm: LanguageModel, tokens: Sequence[Token]) -> list[int]:
    """Ids of answers, each a token that the model can give."""
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, str | int | np.integer):
            raise HeadscopeError(f"an answer is a token, as a string or an id; got {token!r:.60}")
    given = [token if isinstance(token, str) else int(token) for token in tokens]
    found = token_ids(lm, given)
    unknown = getattr(lm.tokenizer, "unk_token_id", None)
    for token, one in zip(given, found, strict=True):
        if not 0 <= one < lm.info.vocab_size:
            raise HeadscopeError(f"answer {token!r} is none of the {lm.info.vocab_size} tokens of {lm.name}")
        if isinstance(token, str) and one == unknown and token.strip() != lm.tokenizer.unk_token:
            raise HeadscopeError(f"{lm.name} has no token for {token!r}, only its unknown token: name another answer")
    return found


Metric = Callable[[Tensor, Pairs], Tensor]


def logit_difference(logits: Tensor, pairs: Pairs) -> Tensor:
    """logit[answer] - logit[other] of each example, from the logits (example, vocabulary) after its last token."""
    index = torch.stack([pairs.answers, pairs.others], 1).to(logits.device)
    both = logits.gather(1, index)
    return both[:, 0] - both[:, 1]


def answer_probability(logits: Tensor, pairs: Pairs) -> Tensor:
    """The probability of each example's answer, from the logits (example, vocabulary) after its last token."""
    return logits.softmax(-1).gather(1, pairs.answers.to(logits.device)[:, None])[:, 0]


def measure(
    lm: LanguageModel,
    pairs: Pairs,
    ids: Tensor,
    handler: Handler,
    metric: Metric = logit_difference,
    *,
    copies: int = 1,
    grad: bool = False,
) -> Tensor:
    """The metric (copy, example) of one forward pass over ``copies`` of the prompts ``ids`` (example, token).

    The rows of the pass are all examples of the first copy, then of the second ...; float32 or wider.

    Raises:
        HeadscopeError: logits that are not numbers.
    """
    width, first = ids.shape[1], int(pairs.lengths.min()) - 1
    model = bare_model(lm)
    options: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
    if takes(model, "logits_to_keep"):
        options["logits_to_keep"] = width - first
    given = {"input_ids": ids, "attention_mask": pairs.real.long()}
    with attached(lm, handler, grad=grad):
        logits = lm.model(**{name: x.repeat(copies, 1).to(lm.device) for name, x in given.items()}, **options).logits
    kept = logits.shape[1]
    last = (pairs.lengths.repeat(copies) - 1 - (width - kept)).to(logits.device)
    logits = logits[torch.arange(len(last), device=logits.device), last]  # (copy x example, vocabulary)
    lm.check_finite(logits.detach())
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.stack([metric(one, pairs) for one in logits.view(copies, len(pairs), -1)])


def share(
    patched: NDArray[np.float64], base: NDArray[np.float64], source: NDArray[np.float64], *, normalize: bool
) -> NDArray[np.float64]:
    """(patched - base) / the mean over examples of (source - base); undivided unless ``normalize``.

    ``patched`` is (example, ...), the others (example,). The mean over examples is a ratio of means, which one pair
    whose prompts differ little cannot blow up as it does a mean of ratios [OURS].

    Raises:
        HeadscopeError: clean and corrupt prompts do not differ in the metric.
    """
    moved: NDArray[np.float64] = patched - base.reshape(-1, *[1] * (patched.ndim - 1))
    if not normalize:
        return moved
    whole = float((source - base).mean())
    if abs(whole) <= 1e-6 * max(1.0, float(np.abs(base).max()), float(np.abs(source).max())):
        raise HeadscopeError(
            "clean and corrupt prompts have the same metric on average, so there is no difference to restore: choose "
            "other prompts, or normalize=False for the effect in the metric's own unit"
        )
    return moved / whole
