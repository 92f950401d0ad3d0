"""How likely continuations of a prompt are, beside its greedy answer: the prompt is read once."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.decoding import answer_text, check_finite, decode, prefill, said_boundary


@dataclass(frozen=True, eq=False)
class Likelihood:
    """A continuation of n tokens: ``each`` (n,) has their log-probabilities in nats, float64; ``ranks`` (n,) how many
    tokens of the vocabulary are likelier than each, 0 where it is the greedy choice."""

    each: Tensor
    ranks: Tensor

    @property
    def total(self) -> float:
        """Log-probability of the continuation, in nats."""
        return float(self.each.sum())


def likelihoods(lm: LanguageModel, ids: Sequence[int], options: Sequence[Sequence[int]]) -> list[Likelihood]:
    """The likelihood of every option behind the prompt ``ids``.

    The prompt but its last token is read once; every option is a pass of its own over a copy of that cache, or one pass
    for all where every option has one token. Rows of options are those of generated tokens, as ``decode`` has them.

    Raises:
        HeadscopeError: a prompt below two tokens, no cache, or logits that are not numbers.
    """
    return _options(lm, prefill(lm, ids[:-1]), int(ids[-1]), options)


def answered(
    lm: LanguageModel, ids: Sequence[int], answer: Sequence[int], max_new_tokens: int, *, newline_stop: bool = False
) -> tuple[str, int, Likelihood]:
    """The greedy answer to the prompt ``ids``, its number of tokens, and the likelihood of ``answer``.

    Raises:
        HeadscopeError: as of ``likelihoods``.
    """
    cache = prefill(lm, ids[:-1])
    found = _options(lm, deepcopy(cache), int(ids[-1]), [answer])[0]
    new = decode(lm, cache, int(ids[-1]), max_new_tokens, newline_stop=newline_stop)
    return answer_text(lm, new), len(new), found


def _options(lm: LanguageModel, cache: Any, last: int, options: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Of every option behind a cache and the prompt's last token; the cache is used up."""
    if all(len(option) == 1 for option in options):
        logits = _logits(lm, cache, [last])
        return [_likelihood(logits, option) for option in options]
    found = []
    for number, option in enumerate(options, 1):
        own = cache if number == len(options) else deepcopy(cache)
        found.append(_likelihood(_logits(lm, own, [last, *option[:-1]]), option))
    return found


def _logits(lm: LanguageModel, cache: Any, ids: Sequence[int]) -> Tensor:
    """What a pass over ``ids`` behind a cache says of the next token, float64 (len(ids), vocabulary)."""
    with said_boundary(int(cache.get_seq_length()) + 1):
        logits = lm.forward(torch.tensor([list(ids)]), cache=cache).logits[0]
    check_finite(lm, logits)
    exact: Tensor = logits.double()
    return exact


def _likelihood(logits: Tensor, option: Sequence[int]) -> Likelihood:
    wanted = torch.tensor(list(option), device=logits.device)[:, None]
    own = logits.gather(-1, wanted)
    return Likelihood((own[:, 0] - logits.logsumexp(-1)).cpu(), (logits > own).sum(-1).cpu())
