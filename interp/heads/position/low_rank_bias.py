"""FlashBias: an additive bias of scores as a few more dimensions of queries and keys, and how many it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError


def bias_rank(bias: Tensor, energy: float = 0.995) -> Tensor:
    """The rank that a bias (..., query, key) needs: how many singular values hold ``energy`` of their squares' sum.

    Integers (...), from 1 on; 0 for a bias of zeros. Wu et al. 2025, "FlashBias" (arXiv 2505.12044) keep 99.5 % of the
    energy of SwinV2's learned biases and use factors where the rank is at most 16; that energy means squares is [OURS],
    their script that makes the factors is not published. A position bias of T5 is ``AttentionCall.position_bias``
    where a mask has not been written into it. What it does not show: that the error left is harmless where attention is
    sharp, since it is in scores; ``attend`` with the factors says that.

    Raises:
        HeadscopeError: a bias that is not finite (a mask in it), or a share outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise HeadscopeError(f"energy={energy}: a share of the energy is above 0 and at most 1")
    squares: Tensor = torch.linalg.svdvals(_wide(bias)).square()
    held = squares.cumsum(-1)
    total = held[..., -1:]
    eps = 8 * torch.finfo(squares.dtype).eps  # a share that is reached but for rounding is reached
    short = (held < (energy - eps) * total).sum(-1)
    return torch.where(total[..., 0] > 0, short + 1, 0)


def bias_factors(bias: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of so many dimensions: (..., query, rank) and (..., key, rank) with Qb Kb^T close to ``bias``.

    The truncated singular value decomposition, each side with the roots of the singular values; float32 at least.

    Raises:
        HeadscopeError: as ``bias_rank``, or a rank that the bias cannot have.
    """
    wide = _wide(bias)
    if not 1 <= rank <= min(bias.shape[-2:]):
        raise HeadscopeError(f"rank={rank}: a bias of {tuple(bias.shape[-2:])} has 1 to {min(bias.shape[-2:])}")
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    root = s[..., :rank].sqrt()
    return u[..., :rank] * root[..., None, :], vh[..., :rank, :].transpose(-1, -2) * root[..., None, :]


def alibi_factors(heads: int, queries: int, keys: int | None = None) -> tuple[Tensor, Tensor]:
    """ALiBi as factors of rank 2, exactly: Qb (head, query, 2) and Kb (1, key, 2) with Qb Kb^T = -m_h (i - j); float64.

    m_h = 2^(-8 (h + 1) / heads), heads counted from 0 (Press et al. 2022, arXiv 2108.12409; as FlashBias has it for any
    number of heads). Queries are the last of the keys. Kb is the same for all heads, so that keys shared by a group
    serve them all. The factors in thuml/FlashBias @ 254a8b8 (``attention_with_alibi_bias.py``), [1, i] m and [-j, 1],
    give +m_h (i - j): the farther a key, the more it gets, the opposite of ALiBi. The sign here is ALiBi's.
    """
    keys = queries if keys is None else keys
    if heads < 1 or not 1 <= queries <= keys:
        raise HeadscopeError(
            f"alibi_factors: {heads} heads, {queries} queries, {keys} keys; queries are among the keys"
        )
    slope = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    i, j = (torch.arange(n - m, n, dtype=torch.float64) for n, m in ((keys, queries), (keys, keys)))
    q = torch.stack([-i, torch.ones_like(i)], -1) * slope[:, None, None]
    return q, torch.stack([torch.ones_like(j), j], -1)[None]


def apply_lowrank_bias(
    q: Tensor, k: Tensor, qb: Tensor, kb: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose plain product, with scale 1, is ``scale`` q.k + Qb Kb^T: [q * scale, Qb] and [k, Kb].

    The bias is added after the scale, as a model adds it. Any attention kernel then computes the biased attention
    without a query x key tensor (values keep their own width).

    Args:
        q: (batch, head, query, d), with ``k`` (batch, kv_head, key, d).
        qb: (..., query, rank) that broadcasts to q's batch and heads, with ``kb`` (..., key, rank) to k's: where key
            heads are shared by a group, Kb has to be as well.
        scale: of q.k (None: 1 / sqrt(d)).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    one, other = (b.to(x.dtype).expand(*x.shape[:-1], -1) for b, x in ((qb, q), (kb, k)))
    return torch.cat([q * scale, one], -1), torch.cat([k, other], -1)


def _wide(bias: Tensor) -> Tensor:
    """The bias in float32 at least."""
    if bias.dim() < 2 or not bool(torch.isfinite(bias).all()):
        raise HeadscopeError("a bias is (..., query, key) and finite: leave the mask out, it is not of low rank")
    return bias.to(torch.promote_types(bias.dtype, torch.float32))
