"""Edits of the pattern after softmax that need no edited pass: mass moved between a few keys and the rest.

A rescale of keys *with* renormalisation is a logit bias (``attend(..., bias=log c)``, identity 5 of the design) and is
answered by every engine; any other change before softmax is a ``ScoreEdit``. Here the keys C get an absolute factor
instead (identity 6):

1. p'_ij = a p_ij for j in C and b_i p_ij elsewhere; m_i the mass of C and M_i of the whole row (1 without sinks);
2. b_i = (M_i - a m_i) / (M_i - m_i) leaves the row's mass as it was; a is lowered to M_i / m_i where it would take more
   than all, and a row whose whole mass lies on C, so that nothing can take it up, stays as it is;
3. every linear statistic and the output change by the same rule: O' = b O + sum_C (a - b) p v;
4. H' = b (H - H_C) - (M - m) b log b + sum_C -(a p) log(a p), with H_C = sum_C -p log p.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headscope.kernels import attention
from headscope.kernels.masks import Mask
from headscope.kernels.request import Attended, Request
from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.targets import target_mass


@torch.no_grad()
def redistribute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    keep: float | Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    edit: ScoreEdit | None = None,
    request: Request,
    engine: attention.Engine = "auto",
) -> Attended:
    """Attention in which key indices ``keys`` (n,) keep the share ``keep`` of their mass; other keys take it up.

    ``q`` (batch, head, query, d), ``k``, ``v`` (batch, kv_head, key, ·). ``keep`` is a number of at least 0 or one a
    head (head,); 0 removes a sink, 1 changes nothing, more moves mass onto the keys. Statistics are of the edited
    pattern, after an ``edit`` of its scores: ``output``, ``entropy``, ``linear`` and ``distance`` may be requested.
    Raises ValueError for any other.
    """
    refused = (request.lse, request.max, request.windows, request.top, request.wants_keys, request.targets is not None)
    if any(refused) or request.query_rows is not None:
        raise ValueError("only output, entropy, linear and distance, of all rows, follow a redistribution")
    options: dict[str, Any] = {"mask": mask, "scale": scale, "softcap": softcap, "bias": bias, "edit": edit}
    ones = torch.ones(k.shape[2], 1, device=q.device)
    columns = (
        ones if request.linear is None else torch.cat([request.linear, ones.expand_as(request.linear[..., :1])], -1)
    )
    asked = replace(request, lse=True, linear=columns)
    got = attention.attend(q, k, v, sinks=sinks, request=asked, engine=engine, **options)
    assert got.lse is not None and got.linear is not None
    targets = (keys + mask.key_offset).expand(1, q.shape[2], -1)
    p = target_mass(q, k, got.lse, targets, **options)
    a, b = _factors(p.sum(-1), got.linear[..., -1], torch.as_tensor(keep, device=q.device, dtype=p.dtype))
    change = (a - b)[..., None] * p
    result = Attended()
    if got.output is not None:
        values = v[:, :, keys].to(p.dtype).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        result.output = (b[..., None] * got.output + change @ values).to(v.dtype)
    if request.linear is not None:
        f = request.linear[..., keys, :].to(p.dtype)
        result.linear = b[..., None] * got.linear[..., :-1] + change @ (f if f.dim() == 2 else f[:, None])
    if got.distance is not None:
        position = torch.arange(q.shape[2], device=q.device)[:, None] + mask.query_offset
        result.distance = b * got.distance + (change * (position - (keys + mask.key_offset))).sum(-1)
    if got.entropy is not None:
        inside = torch.special.entr(p).sum(-1)
        outside = got.linear[..., -1] - p.sum(-1)
        result.entropy = b * (got.entropy - inside) + outside * torch.special.entr(b)
        result.entropy += torch.special.entr(a[..., None] * p).sum(-1)
    return result


def _factors(named: Tensor, whole: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Step 2: (a, b), each (batch, head, query)."""
    keep = keep[:, None] if keep.dim() else keep
    rest = whole - named
    free = rest > 1e-6 * whole  # float32 cannot tell less from nothing
    a = torch.minimum(keep.expand_as(named), whole / named.clamp(min=1e-30))
    b = ((whole - a * named) / torch.where(free, rest, 1.0)).clamp(min=0.0)
    return torch.where(free, a, 1.0), torch.where(free, b, 1.0)
