"""What attention comes to hold of each token, how fast it changes, and the gains that the theory predicts.

Tian et al. 2023 (arXiv 2305.16380). The abstract, and what the authors' code runs and plots, were read; the theorems
are told from memory, and the law of gains is derived anew here [OURS].
"""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.interp.laboratory.scan_and_snap.data import Corpus

STILL = 0.1  # of the fastest change: slower than that, attention counts as frozen


def composition(logits: Tensor, probabilities: Tensor) -> Tensor:
    """c_(l|n), what attention holds of each token in a long sequence: P(l | m, n) e^z_l over its sum, as the authors
    plot it. ``logits`` (..., class, token) of each class's query, ``probabilities`` (class, token)."""
    weights = probabilities * logits.exp()
    shares: Tensor = weights / weights.sum(-1, keepdim=True)
    return shares


def entropy(shares: Tensor) -> Tensor:
    """In nats, over tokens: (..., class)."""
    total: Tensor = torch.special.entr(shares).sum(-1)
    return total


def predicted_gains(probabilities: Tensor, largest: Tensor) -> Tensor:
    """How far the logits of a class's distinct tokens have grown when that of the most frequent, the last, has grown by
    ``largest`` (class,): (class, distinct), from their ``probabilities`` of that shape.

    While the decoder is much faster than attention, z_l of a token that one class alone draws grows at a speed
    proportional to c_l^2, with one factor for the class (c over its norm enters the decoder once when Y_l is learned,
    and once more in the gradient of z_l). Then (1 - e^(-2 gain)) / P(l | m, n)^2 stays the same for all distinct
    tokens: the frequent ones gain, the rare ones stay. Theorem 3 of the paper, by memory, says it by relative gains.
    """
    shared = -torch.expm1(-2 * largest) / probabilities[:, -1] ** 2
    return -0.5 * torch.log1p(-shared[:, None] * probabilities**2)


def prediction_error(gains: Tensor, probabilities: Tensor) -> float:
    """Mean distance of the predicted from the measured ``gains`` (class, distinct), over the mean gain; the token that
    the prediction is made from is left out."""
    told = predicted_gains(probabilities, gains[:, -1])
    return float((told - gains)[:, :-1].abs().mean() / gains[:, :-1].abs().mean())


def speeds(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean change of the logits of the tokens that a class has, from one record to the next.

    ``logits`` (record, class, token), ``tokens`` (class, token) True where P > 0. Returns (record - 1,).
    """
    return (logits[1:] - logits[:-1]).abs()[:, tokens].mean(-1)


def snap(speed: Tensor) -> int:
    """The first record after the fastest change at which the speed has fallen below ``STILL`` of it; the last one
    where it never does."""
    fastest = int(speed.argmax())
    slow = (speed[fastest:] < STILL * speed[fastest]).nonzero()
    return fastest + int(slow[0]) if len(slow) else len(speed)


def moved(one: Tensor, other: Tensor) -> float:
    """Total variation between two compositions (class, token), mean over classes."""
    return float((one - other).abs().sum(-1).mean() / 2)


def summary(logits: Tensor, corpus: Corpus) -> dict[str, float]:
    """Numbers of one record, ``logits`` (class, token): entropy in nats, the share and mean logit of common tokens, and
    mean logits of the rarest, a middling and the most frequent distinct token."""
    shares = composition(logits, corpus.probabilities().to(logits))
    own = logits.gather(1, corpus.own.to(logits.device)).mean(0)
    common = slice(0, corpus.common)
    found = {"token_entropy": entropy(shares).mean(), "common_share": shares[:, common].sum(1).mean()}
    found |= {"common": logits[:, common].mean(), "rarest": own[0], "middling": own[len(own) // 2], "frequent": own[-1]}
    return {name: round(float(value), 4) for name, value in found.items()}
