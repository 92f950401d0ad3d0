"""Fast weights: low-rank changes of the upper MLPs, learned anew from every batch and thrown away after its step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headscope.interp.laboratory.decoder import Decoder
from headscope.interp.laboratory.focusft.turns import seeing
from headscope.kernels.masks import Mask

TARGETS = ("gate", "up", "down")


class Fast(NamedTuple):
    """The change of one linear layer: ``a`` (rank, in) and ``b`` (out, rank) add scale b a to its weight."""

    layer: nn.Linear
    a: Tensor
    b: Tensor


@dataclass(frozen=True, kw_only=True)
class Inner:
    """The inner loop, by default as in the authors' code (``focusft/memory.py`` @ c924c48d, with ``sync_inner`` off).

    LoRA of ``rank`` and scale ``alpha / rank`` on gate, up and down of the layers from int(layers * (1 - share)) on; a
    is drawn uniformly within 1 / sqrt(in), b is 0, so that the first step moves b alone. ``steps`` steps of plain
    gradient descent with ``rate`` on the loss of the answers, in which every tensor's gradient is cut to norm ``clip``
    by itself.
    """

    steps: int = 2
    rate: float = 1.0
    clip: float = 1.0
    rank: int = 32
    alpha: float = 64.0
    share: float = 0.35

    def first(self, layers: int) -> int:
        """The first adapted layer."""
        return int(layers * (1.0 - self.share))

    def fresh(self, model: Decoder, source: torch.Generator) -> list[Fast]:
        """Fast weights that change nothing yet."""
        found = []
        for block in model.layers[self.first(len(model.layers)) :]:
            for name in TARGETS:
                layer = getattr(block, name)
                bound = layer.in_features**-0.5  # what kaiming_uniform_ with a = sqrt(5) comes to
                a = (2 * torch.rand(self.rank, layer.in_features, generator=source) - 1) * bound
                b = torch.zeros(layer.out_features, self.rank)
                found.append(Fast(layer, *(x.to(layer.weight).requires_grad_() for x in (a, b))))
        return found

    @contextmanager
    def adapted(self, fast: list[Fast]) -> Iterator[None]:
        """Inside the block the fast weights are in place; nothing of them stays on the model."""
        with ExitStack() as stack:
            for one in fast:
                stack.callback(one.layer.register_forward_hook(self._hook(one)).remove)
            yield

    def _hook(self, one: Fast) -> Any:
        scale = self.alpha / self.rank
        return lambda layer, given, out: out + scale * (given[0] @ one.a.T @ one.b.T)

    def adapt(self, model: Decoder, ids: Tensor, answered: Tensor, mask: Mask, source: torch.Generator) -> list[Fast]:
        """Fast weights after the inner loop on a batch of conversations (see ``answer_loss``) under ``mask``.

        First order: nothing of the loop is differentiated by the outer step. The layers below those that change give
        the same in every step, so they run once, where the authors run them again. [OURS]
        """
        first, fast = self.first(len(model.layers)), self.fresh(model, source)
        weights = [x for one in fast for x in (one.a, one.b)]
        with seeing(model, mask), self.adapted(fast):
            with torch.no_grad():
                below = model.embed(ids)
                for layer in model.layers[:first]:
                    below = layer(below)
            for _ in range(self.steps):
                with torch.enable_grad():
                    x = below
                    for layer in model.layers[first:]:
                        x = layer(x)
                    loss = answer_loss(model.unembed(model.norm(x)), ids, answered)
                    gradients = torch.autograd.grad(loss, weights)
                with torch.no_grad():
                    for weight, gradient in zip(weights, gradients, strict=True):
                        weight -= self.rate * self.cut(gradient)
        return fast

    def cut(self, gradient: Tensor) -> Tensor:
        """A gradient of norm ``clip`` at most."""
        norm = gradient.norm()
        return gradient * (self.clip / (norm + 1e-12)) if norm > self.clip else gradient


def answer_loss(logits: Tensor, ids: Tensor, answered: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens, each read from the row before it."""
    asked = answered[:, 1:]
    return cross_entropy(logits[:, :-1][asked], ids[:, 1:][asked])
