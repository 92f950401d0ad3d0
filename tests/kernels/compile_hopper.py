"""Compile the Hopper kernels for the card they are written for, on a machine that has none; print what ptxas says.

Not a test: ``test_hopper.py`` runs it in a process of its own, for it replaces Triton's driver.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from headscope.kernels.checks.without_card import NoCard
from headscope.kernels.hopper import bias as hopper_bias
from headscope.kernels.hopper import columns as hopper_columns
from headscope.kernels.hopper import dispatch as hopper
from headscope.kernels.hopper import divergence as hopper_divergence
from headscope.kernels.hopper import heaviest as hopper_heaviest
from headscope.kernels.hopper import output as hopper_output
from headscope.kernels.hopper import rows as hopper_rows
from headscope.kernels.masks import Mask
from headscope.kernels.triton import columns as triton_columns
from headscope.kernels.triton import divergence, heaviest, listed
from headscope.kernels.triton import rows as triton_rows
from headscope.kernels.triton.device import any_length, score
from headscope.kernels.triton.masks import rules

COMPARISONS = 32  # a masked tile makes one for each of a thread's 64 scores


class Compiled:
    """In a kernel's place: compiles what it would launch, and prints what the card would need for it.

    That is: shared memory, loops over whole tiles, how many registers one of these has no room for, and whether ptxas
    gave up overlapping matrix products.
    """

    def __init__(self, kernel: Any, name: str) -> None:
        self.kernel, self.name = kernel, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.say(self.kernel.warmup(*map(any_length, args), grid=grid, **options))

    def say(self, compiled: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            binary = source.with_suffix(".cubin")
            source.write_text(compiled.asm["ptx"])
            log = run(get_ptxas(90).path, "-arch=sm_90a", "-v", str(source), "-o", str(binary)).stderr
            loops = whole_tiles(run(knobs.nvidia.cuobjdump.path, "-sass", str(binary)).stdout)
        stores = max((loop.count("STL") for loop in loops), default=0)
        print(self.name, compiled.metadata.shared, len(loops), stores, "serialized" in log)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """The finished command."""
    return subprocess.run(command, capture_output=True, text=True, check=True)


def whole_tiles(disassembly: str) -> list[list[str]]:
    """The operations of the innermost loops that multiply matrices and compare nothing, as whole tiles need no mask."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([^;]*);", disassembly, re.M)
    at = {int(address, 16): number for number, (address, _) in enumerate(lines)}
    loops = []
    for number, (address, text) in enumerate(lines):
        target = re.match(r"BRA\S*.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < int(address, 16):
            loops.append((at[int(target[1], 16)], number))
    products = [(a, z) for a, z in loops if any("HGMMA" in text for _, text in lines[a:z])]
    inner = [one for one in products if not any(a >= one[0] and z < one[1] for a, z in products)]
    found = [[text.split(".")[0].split()[0] for _, text in lines[a:z]] for a, z in inner]
    return [words for words in found if words.count("ISETP") < COMPARISONS]


def main(d: int, dtype: torch.dtype, mask: Mask, numbers: list[int], options: dict[str, Any]) -> None:
    """Compile the kernels for heads ``d`` wide, with these numbers of features, distance and maxima.

    Not those that another one holds: rows without features, and columns without maxima.
    """
    q, k = torch.zeros(2, 8, 256, d, dtype=dtype), torch.zeros(2, 2, 256, d, dtype=dtype)
    z, seen, s = torch.zeros(2, 8, 256), rules(mask, 2), score(0.1, **({"softcap": None, "bias": None} | options))
    for features in numbers:
        f = torch.zeros(1, 256, features, dtype=dtype) if features else None
        linear = torch.zeros(2, 8, 256, features) if features else None
        rows = triton_rows.Rows(lse=z, max=z, entropy=z, distance=z if features else None, linear=linear)
        sizes = triton_rows.Sizes(8, 4, 256, 256, features)
        if features:
            hopper.fill_rows(q, k, None, f, None, rows, sizes, seen, s, sparse=True)
        sinks, output = z[0, :, 0], rows._replace(output=q)
        for sparse in (True, False)[: 2 if features else 1]:
            hopper.fill_rows(q, k, k.clone(), f, sinks, output, sizes, seen, s, sparse=sparse)
    hopper.fill_columns(q, k, z, z, z, triton_columns.Sizes(8, 4, 256, 0, 256, 256), seen, s)
    norms = z, z, None, None
    unbiased = s._replace(bias=None)  # no divergence has a bias
    sizes = divergence.Sizes(8, 4, 256, 256)
    hopper.fill_distances(q, k, q, k, norms, torch.zeros(4, *z.shape), sizes, seen, unbiased)
    hopper.fill_lists(q, k, listed.room(q, 16), heaviest.Sizes(8, 4, 256, 256, 16), seen, s)


if __name__ == "__main__":
    driver.set_active(NoCard())
    hopper_bias.LEAST = 1
    for module in (hopper_rows, hopper_output, hopper_columns, hopper_divergence, hopper_heaviest):
        module._kernel = Compiled(module._kernel, module.__name__.rsplit(".", 1)[1])
    padded = Mask(start=torch.tensor([0, 3]), end=torch.tensor([256, 200]), right=0, left=100)
    runs = Mask(segments=(torch.arange(256) // 64)[None])
    kind = {"padded": padded, "causal": Mask.causal(), "segments": runs}[sys.argv[3]]
    edits = {"softcap": {"softcap": 50.0}, "bias": {"bias": torch.zeros(2, 8, 256)}}
    extra = {name: x for word in sys.argv[5:] for name, x in edits[word].items()}
    numbers = [int(number) for number in sys.argv[4].split(",")]
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), kind, numbers, extra)
