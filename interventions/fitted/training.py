"""Training a few numbers beside a frozen model: AdamW, a rate that falls in a line to 0, gradients clipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.causal.gates import Tokens, token_log_probabilities
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.progress import track
from headscope.interventions.fitted.losses import dpo_loss, l1, sft_loss

Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Schedule:
    """The defaults are those of transformers' TrainingArguments, which LoFiT's authors leave as they are, but for batch
    and epochs, which are theirs. The rate begins at ``rate`` and falls in a line to 0, without warm-up."""

    rate: float
    epochs: int = 5
    batch: int = 8
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    clip: float = 1.0

    def steps(self, examples: int) -> int:
        """Optimiser steps for so many examples; the last batch of an epoch may be smaller."""
        return self.epochs * math.ceil(examples / self.batch)

    def factor(self, step: int, steps: int) -> float:
        """What the rate is multiplied with at ``step`` (from 0) of ``steps``."""
        return 1 - step / steps


def train(
    parameters: Sequence[Tensor],
    objective: Callable[[Sequence[int]], Tensor],
    examples: int,
    schedule: Schedule,
    seed: int,
    *,
    penalty: float = 0.0,
    what: str = "training",
    progress: bool = True,
) -> Curve:
    """Make ``objective`` (of the indices of a batch) + ``penalty`` * the sum of |parameters| small, in place.

    Every epoch sees every example once, in an order drawn with ``seed`` [OURS: not the order of transformers' trainer].

    Returns:
        each step's ``loss`` (of the task, without the penalty), ``penalty``, ``gradient`` (its norm before clipping)
        and ``rows`` of the batch.

    Raises:
        HeadscopeError: a loss that is not a number.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.rate, betas=schedule.betas, eps=schedule.eps, weight_decay=schedule.decay
    )
    draw = torch.Generator().manual_seed(seed)
    steps, each = schedule.steps(examples), math.ceil(examples / schedule.batch)
    orders = [torch.randperm(examples, generator=draw).tolist() for _ in range(math.ceil(steps / each))]
    batches = [order[i : i + schedule.batch] for order in orders for i in range(0, examples, schedule.batch)][:steps]
    curve: Curve = []
    for step, batch in enumerate(track(batches, what, enabled=progress)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * schedule.factor(step, steps)
        try:
            loss = objective(batch)
        except HeadscopeError as error:
            raise HeadscopeError(f"step {step}: {error}, or lower the rate ({schedule.rate:g})") from error
        cost = penalty * l1(parameters) if penalty else torch.zeros_like(loss)
        optimizer.zero_grad()
        (loss + cost).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        curve.append({"loss": loss.item(), "penalty": cost.item(), "gradient": norm.item(), "rows": len(batch)})
        if not math.isfinite(sum(curve[-1].values())):
            raise HeadscopeError(f"step {step}: a loss or gradient is no number; lower the rate ({schedule.rate:g})")
    return curve


def sft_objective(lm: LanguageModel, rows: Sequence[tuple[Tokens, ...]]) -> Callable[[Sequence[int]], Tensor]:
    """The loss of a batch of responses, on the model as it is at that moment."""

    def loss(batch: Sequence[int]) -> Tensor:
        return sft_loss([one[0] for one in token_log_probabilities(lm, [rows[i][0] for i in batch])])

    return loss


def dpo_objective(
    lm: LanguageModel, rows: Sequence[tuple[Tokens, ...]], reference: Tensor, beta: float
) -> Callable[[Sequence[int]], Tensor]:
    """The loss of a batch of preferences; ``reference`` (row, 2) is ``whole_responses`` of the reference model."""

    def loss(batch: Sequence[int]) -> Tensor:
        said = whole_responses(lm, [rows[i] for i in batch])
        kept = reference[list(batch)].to(said)
        return dpo_loss(said[:, 0], said[:, 1], kept[:, 0], kept[:, 1], beta)

    return loss


def whole_responses(lm: LanguageModel, rows: Sequence[tuple[Tokens, ...]]) -> Tensor:
    """Log-probability of every row's responses as wholes: (row, response)."""
    said = token_log_probabilities(lm, [one for row in rows for one in row])
    return torch.stack([one[0].sum() for one in said]).view(len(rows), -1)


def reference_of(lm: LanguageModel, rows: Sequence[tuple[Tokens, ...]], batch: int) -> Tensor:
    """``whole_responses`` of all rows without gradients, in batches."""
    with torch.no_grad():
        parts = [whole_responses(lm, rows[i : i + batch]) for i in range(0, len(rows), batch)]
    return torch.cat(parts)


def told(schedule: Schedule, examples: int, trained: int) -> dict[str, Any]:
    """A training in numbers, for provenance: its schedule, steps, and how many numbers were trained."""
    return {**vars(schedule), "steps": schedule.steps(examples), "examples": examples, "trained": trained}
