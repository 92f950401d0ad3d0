"""What a declared score edit adds to the loop over whole tiles, in instructions a pair, counted without a card.

    python kernels/benchmarks/edit_loops.py --out loops.json

compiles the calls of the rows "score edit" and "score edit by distance" of ``corners.py``, and some other chains, for
Hopper (causal, bfloat16, d_head 128), and prints for each the instructions that a thread issues for one pair of a query
and a key, those of the same tiles without an edit, registers, and what the loop spills. A loop that issues more is
slower; one that issues less need not be quicker. Another Triton: as in ``headscope.kernels.checks.without_card``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

N, HEADS, KV_HEADS, D = 4096, 32, 8, 128
WANTS = {
    "statistics": frozenset({"lse", "entropy"}),
    "output": frozenset({"output"}),
    "output, statistics": frozenset({"lse", "entropy", "output"}),
    "columns": frozenset[str](),
}


class Compiled:
    """In a kernel's place: compiles what it would launch, and keeps it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.last = kernel, None
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._compile, grid)

    def _compile(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        from headscope.kernels.triton.device import any_length

        self.last, self.options = self.kernel.warmup(*map(any_length, args), grid=grid, **options), options

    def counted(self) -> dict[str, Any]:
        """Of the last: instructions a pair, registers, and instructions of the loop that move spilled numbers."""
        from triton import knobs

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.last.asm["cubin"])  # type: ignore[attr-defined]
            file.flush()
            tool = [knobs.nvidia.cuobjdump.path, file.name]
            said = [subprocess.run([*tool, x], capture_output=True, text=True, check=True).stdout for x in ASKED]
        loop = whole_tiles(said[0])
        threads = 32 * self.options["num_warps"]
        registers = re.search(r"REG:(\d+)", said[1])
        return {
            "tile": [self.options[name] for name in ("BM", "BN", "num_warps", "num_stages")],
            "a pair": len(loop) * threads / (self.options["BM"] * self.options["BN"]),
            "registers": int(registers[1]) if registers else None,
            "spills": sum(word in ("STL", "LDL") for word in loop),
        }


ASKED = ("-sass", "-res-usage")


def whole_tiles(disassembly: str) -> list[str]:
    """The operations of the shortest innermost loop that multiplies matrices: a masked one compares, too."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([^;]*);", disassembly, re.M)
    words = [text.split()[0].split(".")[0] for _, text in lines]
    at = {int(address, 16): number for number, (address, _) in enumerate(lines)}
    found = []
    for number, (address, text) in enumerate(lines):
        target = re.match(r"BRA\S*.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < int(address, 16):
            loop = words[at[int(target[1], 16)] : number + 1]
            # waiting for a fetch goes back, too, from behind the kernel's end
            if "HGMMA" in loop and not {"STG", "EXIT", "RET"} & set(loop):
                found.append(loop)
    return min(found, key=len)


def chains() -> dict[str, Any]:
    """Edits by name."""
    from headscope.kernels.edit_terms import Term
    from headscope.kernels.score_edits import ScoreEdit, by_distance, distance_slope

    on_rows, on_keys, distances = torch.ones(1, HEADS, N), torch.ones(1, 1, N), torch.ones(HEADS, N)
    slope = distance_slope(torch.ones(HEADS))
    return {
        "slope": slope,
        "bias by distance": by_distance(bias=distances),
        "factor by key": ScoreEdit.of(Term(of="score", keys=on_keys)),
        "keys of rows": ScoreEdit.of(Term(queries=on_rows, keys=on_keys)),
        "recent keys": ScoreEdit.of(Term(queries=torch.ones(1, 1, 1), within=(1, 7))),
        "factor and bias by distance": by_distance(scale=distances, bias=distances),
        "slope, then factor": slope.then(ScoreEdit.of(Term(of="score", keys=on_keys))),
    }


def measured(name: str, edit: Any, what: str) -> dict[str, Any]:
    """Counts with the edit, and without on the same tiles."""
    from headscope.kernels.masks import Mask
    from headscope.kernels.triton import columns, device, rows, tuning
    from headscope.kernels.triton.masks import rules

    q, k = torch.zeros(1, HEADS, N, D, dtype=torch.bfloat16), torch.zeros(1, KV_HEADS, N, D, dtype=torch.bfloat16)
    v, lse, mask, group = torch.zeros_like(k), torch.zeros(1, HEADS, N), Mask.causal(), HEADS // KV_HEADS
    module = columns if what == "columns" else rows
    kernel = Compiled(module._kernel)

    def run(edit: Any) -> dict[str, Any]:
        options: dict[str, Any] = {"scale": 0.1, "softcap": None, "bias": None, "edit": edit}
        if what == "columns":
            sizes = columns.Sizes(HEADS, group, N, 0, N, N)
            columns.fill(q, k, lse, torch.zeros_like(lse), None, sizes, rules(mask, 1), **options)
        else:
            values = v if "output" in WANTS[what] else None
            shape: dict[str, Any] = {"sizes": rows.Sizes(HEADS, group, N, N), "mask": mask, "positions": None}
            rows.rows(q, k, values, None, None, **shape, wants=WANTS[what], **options)
        return kernel.counted()

    with ExitStack() as patches:
        patches.enter_context(patch.object(device, "has_copy_engine", lambda _: True))
        patches.enter_context(patch.object(module, "_kernel", kernel))
        found = run(edit)
        for sizes in ("row_tiles", "column_tiles"):
            patches.enter_context(patch.object(tuning, sizes, lambda *_: tuning.Tiles(*found["tile"])))
        return {"edit": name, "what": what, **found, "without": run(None)["a pair"]}


def main() -> None:
    """Parse the command line, count, and say so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", default="", help="names between semicolons; all by default")
    parser.add_argument("--what", default=";".join(WANTS), help="of statistics; output; output, statistics; columns")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    import triton
    from triton.runtime import driver

    from headscope.kernels.checks.without_card import NoCard

    driver.set_active(NoCard())
    table = []
    for name, edit in chains().items():
        for what in args.what.split(";"):
            if not args.edits or name in args.edits.split(";"):
                table.append(measured(name, edit, what))
                row = table[-1]
                said = f"{row['a pair']:6.2f} a pair, {row['without']:6.2f} without; {row['registers']} registers"
                print(f"{name:<28} {what:<19} {said}, {row['spills']} spills, {tuple(row['tile'])}", flush=True)
    if args.out is not None:
        found = {"kind": "edit loops", "triton": triton.__version__, "loops": table}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
