"""Conversations about what a long context holds: pairs of a key and a value, among decoys and noise. [OURS]"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import check_counts

START, TRUE, DECOY, END = range(4)  # the tokens that are no word


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """The law of the task.

    A conversation is ``START``, a context of ``slots`` slots, and ``turns`` questions with their answers. Each of
    ``pairs`` keys stands in the context twice, behind ``TRUE`` with its value and behind ``DECOY`` with another (values
    are ``length`` words each, drawn alike); the other slots hold noise. Keys, values and noise are different words. A
    question is ``TRUE`` and a key that was not asked before; its answer the key's value and ``END``. So whoever copies
    what followed the key somewhere is right half of the time.

    Raises:
        HeadscopeError: more pairs than keys or slots, or more turns than pairs.
    """

    keys: int = 16
    values: int = 16
    noise: int = 16
    pairs: int = 4
    slots: int = 24
    turns: int = 2
    length: int = 3

    def __post_init__(self) -> None:
        check_counts(1, **vars(self))
        if self.pairs > self.keys or 2 * self.pairs > self.slots or self.turns > self.pairs:
            raise HeadscopeError(
                f"{self.pairs} pairs of {self.keys} keys, twice each in {self.slots} slots, in {self.turns} turns: "
                "take at most as many pairs as keys, half as many as slots, and no more turns than pairs"
            )

    @property
    def vocabulary(self) -> int:
        """Tokens in all: the four marks, keys, values, noise, in this order."""
        return 4 + self.keys + self.values + self.noise

    @property
    def tokens(self) -> int:
        """Of a conversation."""
        return 1 + self.slots * (2 + self.length) + self.turns * (3 + self.length)

    def draw(self, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` conversations: ids (conversation, token), and which tokens are an answer's, bool."""

        def chosen(of: int, some: int) -> Tensor:  # different ones, in any order
            return torch.rand(count, of, generator=source).argsort(1)[:, :some]

        def words(first: int, of: int, *shape: int) -> Tensor:
            return first + torch.randint(of, (count, *shape), generator=source)

        key, values = 4 + chosen(self.keys, self.pairs), 4 + self.keys
        value, other = (words(values, self.values, self.pairs, self.length) for _ in range(2))
        context = words(values + self.values, self.noise, self.slots, 2 + self.length)
        marks = torch.tensor([TRUE, DECOY]).repeat_interleave(self.pairs).expand(count, -1)
        held = torch.cat([marks[..., None], key.repeat(1, 2)[..., None], torch.cat([value, other], 1)], -1)
        at = chosen(self.slots, 2 * self.pairs)[..., None].expand_as(held)
        parts = [torch.full((count, 1), START), context.scatter(1, at, held).flatten(1)]  # slots one after the other
        answered = [torch.zeros(count, parts[1].shape[1] + 1, dtype=torch.bool)]
        for which in chosen(self.pairs, self.turns).T:
            row = torch.arange(count)
            question = torch.stack([torch.full((count,), TRUE), key[row, which]], 1)
            answer = torch.cat([value[row, which], torch.full((count, 1), END)], 1)
            parts += [question, answer]
            answered += [torch.zeros_like(question, dtype=torch.bool), torch.ones_like(answer, dtype=torch.bool)]
        return torch.cat(parts, 1), torch.cat(answered, 1)


def repeats(count: int, length: int, vocabulary: int, source: torch.Generator) -> Tensor:
    """What a model reads before it is fine-tuned: ``START`` and ``length`` tokens that begin anew after an eighth to a
    half of them, every text after its own number (text, 1 + length). To say what comes, look for what followed the same
    token: the distance differs from text to text, so that it cannot be learned by heart."""
    longest = length // 2
    words = torch.randint(1, vocabulary, (count, longest), generator=source)
    period = torch.randint(length // 8, longest + 1, (count, 1), generator=source)
    return torch.cat([torch.full((count, 1), START), words.gather(1, torch.arange(length) % period)], 1)
