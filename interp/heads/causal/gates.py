"""Gates on heads and how they are trained: one number a head in [0, 1] that z is multiplied by, the model frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites import attached
from headscope.interp.sites.gradients import frozen
from headscope.interp.sites.unwrap import bare_model, takes

Tokens = tuple[list[int], list[int]]  # of a prompt, and of what should follow it
Objective = Callable[[np.random.Generator], Tensor]  # a batch is drawn -> what every mask is to make small: (mask,)


class Gates(Handler):
    """Multiplies every head's z, at all positions, by ``values`` (mask, layer, head); the rows of a pass are the
    examples of the first mask, then those of the second ..."""

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self.layers: set[int] = set()

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """z times the gates of the layer's heads."""
        self.layers.add(call.layer)
        if self.values is None:
            return z
        own = self.values[:, call.layer, : z.shape[1]].repeat_interleave(z.shape[0] // len(self.values), dim=0)
        return z * own.to(z)[:, :, None, None]


class TokenGates(Gates):
    """A gate of 1 on every head's z at every token: ``at`` holds each layer's (example, head, query), to be asked for
    their gradient, which is z . dL/dz."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[int, Tensor] = {}

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """z itself, in a graph that leads to the gates."""
        self.at[call.layer] = gate = torch.ones(z.shape[:3], device=z.device, requires_grad=True)
        return (z * gate[..., None]).to(z.dtype)


@dataclass(frozen=True)
class Stage:
    """Adam for ``updates`` steps at a rate that falls in a line from ``rate`` to ``end``; ``penalty`` is lambda."""

    updates: int
    rate: float
    end: float
    penalty: float
    clip: float = 4.0


@contextmanager
def gated(lm: LanguageModel, gates: Gates | None = None) -> Iterator[Gates]:
    """Gates (or ``gates``) on a frozen model inside the block, with gradients towards them alone."""
    gates = Gates() if gates is None else gates
    with frozen(lm), attached(lm, gates, grad=True):
        yield gates


def fit(gates: Gates, theta: Tensor, objective: Objective, stage: Stage, rng: np.random.Generator) -> Tensor:
    """Logits of gates (mask, layer, head) after a stage from ``theta``; every mask is trained for itself.

    The loss of a mask is its objective - penalty * the mean over heads of clip(theta, -clip, clip).
    """
    theta = theta.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([theta], lr=stage.rate)
    for step in range(stage.updates):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate + (stage.end - stage.rate) * step / stage.updates
        gates.values = theta.sigmoid()
        # the sum over masks: no mask has a part in another's gradient
        loss = (objective(rng) - stage.penalty * theta.clamp(-stage.clip, stage.clip).mean((1, 2))).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    gates.values = None
    return theta.detach()


def log_probabilities(lm: LanguageModel, gates: Gates, batch: Sequence[Tokens]) -> Tensor:
    """Mean log-probability of each target's tokens under every mask: (mask, example)."""
    said = token_log_probabilities(lm, batch, 1 if gates.values is None else len(gates.values))
    return torch.stack([one.mean(-1) for one in said], dim=1)


def token_log_probabilities(lm: LanguageModel, batch: Sequence[Tokens], copies: int = 1) -> list[Tensor]:
    """Log-probability of every token of each example's target after its prompt: (copy, token of the target), float32
    or wider.

    Examples are padded to the right and pass together, ``copies`` times; gradients are kept where they are on.

    Raises:
        HeadscopeError: logits that are not numbers.
    """
    width = max(len(x) + len(y) for x, y in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    real = torch.zeros_like(ids)
    for b, (x, y) in enumerate(batch):
        ids[b, : len(x) + len(y)] = torch.tensor([*x, *y])
        real[b, : len(x) + len(y)] = 1
    first = min(len(x) for x, _ in batch) - 1  # no logit before it is looked at
    model = bare_model(lm)
    options: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
    if takes(model, "logits_to_keep"):
        options["logits_to_keep"] = width - first
    inputs = {"input_ids": ids, "attention_mask": real}
    moved = {name: x.repeat(copies, 1).to(lm.device) for name, x in inputs.items()}
    logits = lm.model(**moved, **options).logits[:, -(width - first) :]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not bool(logits.detach().isfinite().all()):
        raise HeadscopeError(f"{lm.name} gives logits that are not numbers: load it with dtype='float32'")
    log_p = logits.log_softmax(-1)[:, :-1]  # (row, position - first, vocabulary)
    said = log_p.gather(-1, moved["input_ids"][:, first + 1 :, None]).squeeze(-1).view(copies, len(batch), -1)
    return [said[:, b, len(x) - 1 - first :][:, : len(y)] for b, (x, y) in enumerate(batch)]


def shuffled(count: int, batch: int) -> Callable[[np.random.Generator], list[int]]:
    """Indices of the next ``batch`` of ``count`` examples: every example once, in a drawn order, before any again."""
    waiting: list[int] = []

    def draw(rng: np.random.Generator) -> list[int]:
        while len(waiting) < batch:
            waiting.extend(rng.permutation(count).tolist())
        taken = waiting[:batch]
        del waiting[:batch]
        return taken

    return draw


def start(seed: int, members: Sequence[int], layers: int, heads: int) -> Tensor:
    """Logits of gates drawn from U(0, 1), for every seed of ``members`` its own: (member, layer, head)."""
    drawn = np.stack([np.random.default_rng([seed, i]).uniform(1e-6, 1 - 1e-6, (layers, heads)) for i in members])
    return torch.logit(torch.from_numpy(drawn)).float()
