"""Run every kernel for Hopper once, for a profiler to look at: columns; rows with and without features, and the output.

metrics=sm__pipe_tensor_cycles_active,sm__inst_executed_pipe_xu,sm__inst_issued
metrics=$(echo $metrics | sed 's/,\\|$/.avg.pct_of_peak_sustained_elapsed&/g')
ncu --clock-control none -k regex:^_kernel$ --metrics $metrics python kernels/benchmarks/hopper_profile.py
"""

from __future__ import annotations

import torch

from headscope.kernels import gpu_passes as passes
from headscope.kernels.benchmarks.timed import tensors
from headscope.kernels.masks import Mask


def main(tokens: int = 16384) -> None:
    """bfloat16, causal; d_head 128, then 64; rows, then rows with the output: without features, then with 16."""
    for d in (128, 64):
        q, k, v, flags = tensors(tokens, tokens, d)
        mask, scale = Mask.causal(), d**-0.5
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
