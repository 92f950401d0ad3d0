"""Tensor parallelism as transformers does it, two gloo processes on the CPU: one record, global head numbers.

The expected values are one process's on the whole model. The processes multiply parts of the same matrices and add them
up, so that numbers differ by rounding: sums of 64 and 96 products of order 1 in float32, over two layers, stay below
1e-5; another head's number, or half of one, differs by 1e-2 and more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")


def launch(folder: Path, *arguments: str) -> list[dict[str, float | str]]:
    """What each of two processes found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(WORKER), str(folder), *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
