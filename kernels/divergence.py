"""How far two patterns over the same keys lie apart, query by query: two runs, or two heads.

Per query, over its visible keys, with log p and log r from each side's lse (nats):

1. KL(p || r) = sum p (log p - log r); no logarithm is taken of a weight, so none underflows;
2. log m = logaddexp(log p, log r) - log 2; JS = (sum p (log p - log m) + sum r (log r - log m)) / 2, at most log 2;
3. TV = sum |p - r| / 2; cosine = sum p r / sqrt(sum p^2 sum r^2).

Definition: ``dense``. With sink logits p and r sum to less than one and the sums run over the keys alone. An empty row
has divergence 0 and cosine 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headscope.kernels import attention
from headscope.kernels.masks import Mask
from headscope.kernels.request import Request
from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.weights import log_weights


class Divergence(NamedTuple):
    """Per query (batch, head, query): Jensen-Shannon and KL in nats, total variation and cosine in [0, 1]."""

    js: Tensor
    kl: Tensor
    tv: Tensor
    cosine: Tensor


def dense(log_p: Tensor, log_r: Tensor) -> Divergence:
    """The definition, from two log patterns (..., key) with -inf at hidden keys."""
    p, r = log_p.exp(), log_r.exp()
    log_m = torch.logaddexp(log_p, log_r) - math.log(2.0)

    def relative(x: Tensor, log_x: Tensor, log_y: Tensor) -> Tensor:
        return torch.where(log_x == -torch.inf, 0.0, x * (log_x - log_y)).sum(-1)

    js = (relative(p, log_p, log_m) + relative(r, log_r, log_m)) / 2
    norm = (p.square().sum(-1) * r.square().sum(-1)).sqrt()
    cosine = (p * r).sum(-1) / torch.where(norm > 0, norm, 1.0)
    return Divergence(js, relative(p, log_p, log_r), (p - r).abs().sum(-1) / 2, cosine)


@torch.no_grad()
def divergence(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: tuple[Tensor | None, Tensor | None] = (None, None),
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    edits: tuple[ScoreEdit | None, ScoreEdit | None] = (None, None),
    engine: attention.Engine = "auto",
) -> Divergence:
    """Distances between the patterns of ``first`` and ``second``, each (q, k) under the same mask and scale.

    q (batch, head, query, d), k (batch, kv_head, key, d); the pairs may differ in d and kv_head. To compare heads
    of one call, index them: ``(q[:, a], k[:, a_kv])``; to see what an edit of the scores did, give the same pair twice
    and ``edits=(None, edit)``, or ``biases`` of keys. Raises ValueError where queries, heads or keys differ.
    """
    (q, k), (u, w) = first, second
    if q.shape[:3] != u.shape[:3] or k.shape[2] != w.shape[2]:
        raise ValueError(f"patterns of different shapes: {[tuple(x.shape) for x in (q, k, u, w)]}")
    options: dict[str, Any] = {"mask": mask, "scale": scale, "softcap": softcap}
    norms = []
    for (a, b), z, bias, edit in zip((first, second), sinks, biases, edits, strict=True):
        request = Request(output=False, lse=True)
        got = attention.attend(a, b, b, sinks=z, bias=bias, edit=edit, request=request, engine=engine, **options)
        assert got.lse is not None
        norms.append(got.lse)
    same = q.shape[3] == u.shape[3] and q.dtype == u.dtype and k.shape[1] == w.shape[1]
    plain = all(x is None for x in (*biases, *edits))
    if same and plain and attention.uses_triton(engine, q, k, mask):
        from headscope.kernels.triton_divergence import distances  # triton is optional

        return Divergence(*distances(first, second, norms[0], norms[1], **options))
    parts = [
        dense(p.log_p, r.log_p)
        for p, r in zip(
            log_weights(q, k, norms[0], bias=biases[0], edit=edits[0], **options),
            log_weights(u, w, norms[1], bias=biases[1], edit=edits[1], **options),
            strict=True,
        )
    ]
    return Divergence(*(torch.cat(x, -1) for x in zip(*parts, strict=True)))


def output_distance(first: Tensor, second: Tensor) -> Tensor:
    """L2 distance of two outputs (batch, head, query, d_value), per query in float32: (batch, head, query)."""
    apart: Tensor = torch.linalg.vector_norm(first.float() - second.float(), dim=-1)
    return apart
