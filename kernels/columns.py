"""How much the queries give to each key: column reductions of the pattern from a known lse (identity 4 of the design).

1. p_ij = exp(s_ij - lse_i): with lse known, a column needs no softmax, and a pass over blocks of keys no atomics.
2. A weight w_i on each query is exp(s_ij - (lse_i - log w_i)): a weighted column sum (what flash attention's backward
   pass calls dV, for dO = w) is an unweighted one from another lse.

Definition: the columns of ``reference.attend``, which ``attention.attend`` gives where lse is not known before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headscope.kernels import attention
from headscope.kernels.fallback import falls_back
from headscope.kernels.request import ReducedColumns
from headscope.kernels.scores import Scores
from headscope.kernels.streaming.weights import log_weights


@torch.no_grad()
def columns(
    scores: Scores,
    lse: Tensor,
    *,
    queries: tuple[int, int] | None = None,
    total: bool = True,
    highest: bool = False,
    engine: attention.Engine = "auto",
) -> ReducedColumns:
    """Reduce the columns of the pattern over the query rows ``queries = (first, stop)``, all by default.

    ``lse`` (batch, head, query) as ``attention.attend``
    gives it, a sink logit included, less the logarithm of the queries' weights where they have any (+inf: weight 0).
    Raises ValueError for inputs that do not belong together.
    """
    batch, heads, rows, keys = scores.shape
    first, stop = queries or (0, rows)
    scores.check()
    if lse.shape != (batch, heads, rows) or not 0 <= first <= stop <= rows:
        raise ValueError(
            f"lse must be (batch, head, query) {(batch, heads, rows)} of all queries, and queries a part of them; got "
            f"{tuple(lse.shape)} and {(first, stop)}"
        )
    if scores.in_kernels and attention.uses_triton(engine, scores):
        from headscope.kernels import gpu_passes as passes

        options: dict[str, Any] = {"queries": queries, "total": total, "highest": highest, **scores.device_arguments}
        with falls_back("the streaming engine"):
            return ReducedColumns(*passes.columns(scores.q, scores.k, lse, **options))
    here = scores.rows(slice(first, stop))
    zero = lse.new_zeros(batch, heads, keys)
    sums, most = zero, zero.clone()
    for tile_rows, tile_keys, log_p in log_weights(here, lse[:, :, first:stop]):
        if not log_p.numel():
            continue
        p = log_p.exp_()
        real = here.mask.query_is_real(torch.arange(tile_rows.start, tile_rows.stop, device=lse.device))
        if real is not None:
            p *= real[:, None, :, None]
        if total:
            sums[..., tile_keys] += p.sum(2)
        if highest:
            most[..., tile_keys] = torch.maximum(most[..., tile_keys], p.amax(2))
    return ReducedColumns(sums if total else None, most if highest else None)
