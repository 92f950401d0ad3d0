"""Compile the Hopper kernels for the card they are written for, on a machine that has none; print what ptxas says.

Not a test: ``test_hopper.py`` runs it in a process of its own, for it replaces Triton's driver.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from headscope.kernels import hopper_columns, hopper_output, hopper_rows, triton_columns, triton_rows
from headscope.kernels.hopper_device import tiles
from headscope.kernels.masks import Mask
from headscope.kernels.triton_masks import rules


class NoCard:
    """A driver that knows what to compile for, and nothing else."""

    utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132})

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int | None = None) -> int:
        return 0


def say(name: str, kernel: object) -> None:
    """One line: shared memory, bytes spilt, and whether ptxas gave up overlapping matrix products."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])  # type: ignore[attr-defined]
        command = [get_ptxas(90).path, "-arch=sm_90a", "-v", str(source), "-o", str(source.with_suffix(".cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilt = sum(int(line.split("bytes spill stores")[0].split()[-1]) for line in log.splitlines() if "spill" in line)
    print(name, kernel.metadata.shared, spilt, "serialized" in log)  # type: ignore[attr-defined]


def main(dtype: torch.dtype, mask: Mask) -> None:
    """Compile every kernel with and without features, distance and maxima."""
    q, k = torch.zeros(2, 8, 256, 128, dtype=dtype), torch.zeros(2, 2, 256, 128, dtype=dtype)
    z, seen = torch.zeros(2, 8, 256), rules(mask, 2)
    sizes = triton_rows.Sizes(8, 4, 256, 256)
    for features in (0, 16, 32):
        f = torch.zeros(1, 256, features, dtype=dtype) if features else None
        linear = torch.zeros(2, 8, 256, features) if features else None
        found = triton_rows.Rows(lse=z, max=z, entropy=z, distance=z if features else None, linear=linear)
        at = tiles(q, 64), tiles(k, 128), None if f is None else tiles(f, 128)
        compiled = hopper_rows._kernel.warmup(
            *at, None, found, sizes, seen, 0.1, 0, REGISTERS=160, num_warps=4, grid=(2, 16)
        )
        say(f"rows, {features} features", compiled)
        n = 64 if features else 128
        at = tiles(q, 64), tiles(k, n), tiles(k, n), None if f is None else tiles(f, n)
        compiled = hopper_output._kernel.warmup(
            *at,
            z[0, :, 0],
            found._replace(output=q),
            sizes,
            seen,
            0.1,
            0,
            STAGES=4 if features else 2,
            num_warps=4,
            grid=(2, 16),
        )
        say(f"output, {features} features", compiled)
    for highest in (None, z):
        of = triton_columns.Sizes(8, 4, 256, 0, 256, 256)
        at = tiles(q, 64), tiles(k, 128)
        compiled = hopper_columns._kernel.warmup(
            *at, z, z, highest, of, seen, 0.1, REGISTERS=240, num_warps=4, grid=(1, 16)
        )
        say("columns" if highest is None else "columns with maxima", compiled)


if __name__ == "__main__":
    driver.set_active(NoCard())
    padded = Mask(start=torch.tensor([0, 3]), end=torch.tensor([256, 200]), right=0, left=100)
    main(getattr(torch, sys.argv[1]), padded if sys.argv[2:] == ["padded"] else Mask.causal())
