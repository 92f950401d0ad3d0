"""What fits make small: negative log-likelihood of responses, preferences, and the size of what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def sft_loss(said: Sequence[Tensor]) -> Tensor:
    """Mean negative log-likelihood over all response tokens of a batch, in nats a token.

    A long response weighs more than a short one, as in the cross-entropy of transformers' trainer, whose labels are
    -100 outside responses.

    Args:
        said: log-probabilities of each response's tokens, (token,) each.
    """
    return -torch.cat(list(said)).mean()


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.5
) -> Tensor:
    """Mean over pairs of -log sigmoid(beta ((log p_c - log p_r) - (log ref_c - log ref_r))).

    Direct preference optimisation with the sigmoid loss (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7), log p being
    the sum over a response's tokens; log 2 where the model is its own reference.

    Args:
        chosen, rejected: log-probabilities of whole responses under the model that is trained, (pair,).
        reference_chosen, reference_rejected: the same under the reference.
        beta: how much straying from the reference costs; LoFiT takes 0.5.
    """
    margin = (chosen - rejected) - (reference_chosen - reference_rejected)
    return -functional.logsigmoid(beta * margin).mean()


def l1(parameters: Iterable[Tensor]) -> Tensor:
    """The sum of |.| over every number (not the mean: lambda depends on how many are trained)."""
    return torch.stack([one.abs().sum() for one in parameters]).sum()
