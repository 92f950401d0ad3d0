"""Run every kernel for Hopper once, for a profiler to look at.

metrics=sm__pipe_tensor_cycles_active,sm__inst_executed_pipe_xu,sm__inst_issued
metrics=$(echo $metrics | sed 's/,\\|$/.avg.pct_of_peak_sustained_elapsed&/g')
ncu --clock-control none -k regex:_kernel --metrics $metrics python kernels/benchmarks/profile.py
"""

from __future__ import annotations

import torch

from headscope.kernels import passes
from headscope.kernels.benchmarks.h100 import tensors
from headscope.kernels.masks import Mask


def main(tokens: int = 16384) -> None:
    """Columns; rows with and without 16 linear statistics; both with the output. bfloat16, d_head 128, causal."""
    q, k, v, flags = tensors(tokens, tokens, 128)
    mask, scale = Mask.causal(), 128**-0.5
    lse = torch.zeros(q.shape[:3], device=q.device)
    passes.columns(q, k, lse, mask=mask, scale=scale)
    for values in (None, v):
        for features in (None, flags):
            wants = {"lse", "entropy"} | ({"linear"} if features is not None else set())
            wants |= {"output"} if values is not None else set()
            passes.rows(q, k, values, mask=mask, scale=scale, features=features, wants=frozenset(wants))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
