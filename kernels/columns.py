"""How much the queries give to each key: column reductions of the pattern from a known lse (identity 4 of the design).

1. p_ij = exp(s_ij - lse_i): with lse known, a column needs no softmax, and a pass over blocks of keys no atomics.
2. A weight w_i on each query is exp(s_ij - (lse_i - log w_i)): a weighted column sum (what flash attention's backward
   pass calls dV, for dO = w) is an unweighted one from another lse.

Definition: the columns of ``reference.attend``, which ``attention.attend`` gives where lse is not known before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headscope.kernels import attention
from headscope.kernels.fallback import falls_back
from headscope.kernels.masks import Mask
from headscope.kernels.request import ReducedColumns
from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.streaming.weights import log_weights


@torch.no_grad()
def columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    edit: ScoreEdit | None = None,
    queries: tuple[int, int] | None = None,
    total: bool = True,
    highest: bool = False,
    engine: attention.Engine = "auto",
) -> ReducedColumns:
    """Reduce the columns of the pattern over the query rows ``queries = (first, stop)``, all by default.

    ``q`` (batch, head, query, d), ``k`` (batch, kv_head, key, d); ``lse`` (batch, head, query) as ``attention.attend``
    gives it, a sink logit included, less the logarithm of the queries' weights where they have any (+inf: weight 0).
    Raises ValueError for inputs that do not belong together.
    """
    first, stop = queries or (0, q.shape[2])
    attention.check(q, k, k, None, bias)
    if lse.shape != q.shape[:3] or not 0 <= first <= stop <= q.shape[2]:
        raise ValueError(
            f"lse must be (batch, head, query) {tuple(q.shape[:3])} of all queries, and queries a part of them; got "
            f"{tuple(lse.shape)} and {(first, stop)}"
        )
    options: dict[str, Any] = {"mask": mask, "scale": scale, "softcap": softcap, "bias": bias}
    if edit is None and attention.uses_triton(engine, q, k, mask):
        from headscope.kernels import gpu_passes as passes

        with falls_back("the streaming engine"):
            return ReducedColumns(*passes.columns(q, k, lse, queries=queries, total=total, highest=highest, **options))
    here = replace(mask, query_offset=mask.query_offset + first)
    options["mask"], options["edit"] = here, edit
    zero = lse.new_zeros(q.shape[0], q.shape[1], k.shape[2])
    sums, most = zero, zero.clone()
    for rows, keys, log_p in log_weights(q[:, :, first:stop], k, lse[:, :, first:stop], **options):
        if not log_p.numel():
            continue
        p = log_p.exp_()
        real = here.query_is_real(torch.arange(rows.start, rows.stop, device=q.device))
        if real is not None:
            p *= real[:, None, :, None]
        if total:
            sums[..., keys] += p.sum(2)
        if highest:
            most[..., keys] = torch.maximum(most[..., keys], p.amax(2))
    return ReducedColumns(sums if total else None, most if highest else None)
