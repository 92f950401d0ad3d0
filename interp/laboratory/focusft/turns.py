"""The mask of turns: context sees itself in both directions, answers see backwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.laboratory.decoder import Decoder
from headscope.interp.laboratory.variants.softmax import Softmax
from headscope.kernels.masks import Mask


def turn_mask(answered: Tensor) -> Mask:
    """Who sees whom in conversations whose answers are ``answered`` (conversation, token), bool; nothing is padded.

    A turn is a run of equal ``answered``, so that all that comes before an answer is one turn (the authors' code calls
    it GLM's mask, ``focusft/attention.py`` @ c924c48d). Every token sees all earlier turns and no later one; in its own
    turn a context token sees every token, an answer's token itself and those before it. All answers: causal; none:
    full.

    So a context token has seen what follows it in its turn: read no log-likelihood of the context from such a pass.
    """
    change = torch.zeros_like(answered, dtype=torch.long)
    change[:, 1:] = answered[:, 1:] != answered[:, :-1]
    turn = change.cumsum(1)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = turn[b, q] == turn[b, k]
        return (turn[b, k] < turn[b, q]) | (same & (~answered[b, q] | (k <= q)))

    return Mask(right=None, rule=rule, examples=len(answered))


class Turned(Softmax):
    """Softmax attention whose mask a block of code may replace (``seeing``)."""

    name: ClassVar[str] = "turned"
    seen: Mask | None = None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.see(q, k, v, mask=self.shape.mask if self.seen is None else self.seen)


@contextmanager
def seeing(model: Decoder, mask: Mask) -> Iterator[None]:
    """Inside the block the layers of ``model``, made with ``Turned``, attend under ``mask``."""
    attentions: list[Any] = [layer.attention for layer in model.layers]
    for attention in attentions:
        attention.seen = mask
    try:
        yield
    finally:
        for attention in attentions:
            attention.seen = None
