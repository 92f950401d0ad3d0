"""Time the corners in which a kernel could be slow, each beside SDPA's default on the same tensors and its target.

    python kernels/benchmarks/corners.py --check 120 --limit 400 --sweep --out kernels/benchmarks/results/h200-corners.json

A row of ``corner_rows`` that fails says so and stops no other. Results are printed and saved row by row; after
``--limit`` seconds the rows that are left are named. ``--check``: first, for so many seconds, the kernels that the rows
run are held to the definition (``gpu_groups``), and 1 is the exit code if one is wrong. ``--sweep``: other tiles, too.
Kernels are built beforehand, several at a time, into Triton's cache. ``--tiny`` runs every row at a few tokens, on a
CPU in Triton's interpreter: it tries the script, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

from headscope.kernels import fallback
from headscope.kernels.benchmarks import gpu_groups
from headscope.kernels.benchmarks.clock import median
from headscope.kernels.benchmarks.corner_rows import ROWS, SWEEPS, Row, Sweep, Timed

CHECKED = ("Hopper's widths and options", "float32", "maps and divergences", "moved mass and spans")
Job = tuple[int, int, int]  # row, sweep or -1, its setting


def device() -> dict[str, str]:
    """What the numbers were measured on."""
    names = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", **names}


@contextmanager
def setting(sweep: Sweep | None, number: int) -> Iterator[None]:
    """Within the block, a kernel's tiles are the sweep's."""
    with ExitStack() as patches, warnings.catch_warnings():
        warnings.simplefilter("error", fallback.EngineWarning)  # it is this kernel that is timed, or none
        fallback._FAILED.clear()  # tiles that are too large say nothing of others
        if sweep is not None:
            patches.enter_context(patch.object(sweep.module, sweep.name, lambda *_: sweep.settings[number]))
        yield


def jobs(sweep: bool) -> list[Job]:
    """What is timed, in order: rows, then their other tiles."""
    listed = [(n, -1, 0) for n in range(len(ROWS))]
    if sweep:
        rows = {row.key: n for n, row in enumerate(ROWS)}
        listed += [(rows[s.row], n, i) for n, s in enumerate(SWEEPS) for i in range(len(s.settings))]
    return listed


def build(job: tuple[Job, float]) -> str:
    """Run a row once, so that its kernels are in Triton's cache; what went wrong."""
    (row, sweep, number), until = job
    if time.time() > until:
        return "no time"
    try:
        with setting(SWEEPS[sweep] if sweep >= 0 else None, number):
            for one in ROWS[row].make(1):
                one.run()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def time_one(row: Row, one: Timed, bases: dict[Any, float]) -> dict[str, Any]:
    """A measurement: milliseconds (microseconds of the host where there is nothing to compare with)."""
    found: dict[str, Any] = {"row": row.name, "what": one.name, "now": one.now, "target": one.target}
    if one.base is None:
        return found | {"us": one.run(), "measured": None}
    if one.key not in bases:
        bases[one.key] = median(one.base, 0.1)
    one.run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one.run()
        found["extra MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    ms = median(one.run, 0.1)
    return found | {"ms": ms, "SDPA ms": bases[one.key], "measured": ms / bases[one.key]}


def run(sweep: bool, tiny: bool, began: float, limit: float, out: Path | None) -> list[dict[str, Any]]:
    """Time every row until the limit."""
    table: list[dict[str, Any]] = []
    listed, bases = jobs(sweep), {}
    if not tiny:
        with mp.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
            until = began + 0.55 * limit
            said = pool.map(build, [(job, until) for job in listed], chunksize=1)
        for job, words in zip(listed, said, strict=True):
            if words:
                print(f"not built: {ROWS[job[0]].name} {job[1:]}: {words}", flush=True)
        print(f"{time.time() - began:.0f} s, kernels are built", flush=True)
    for number, at, which in listed:
        row, other = ROWS[number], SWEEPS[at] if at >= 0 else None
        if time.time() - began > limit:
            table.append({"row": row.name, "setting": str(other.settings[which]) if other else None, "no time": True})
            print("no time:", row.name, table[-1]["setting"] or "", flush=True)
            continue
        try:
            with setting(other, which):
                for one in row.make(64 if tiny else 1):
                    if other is not None and one.name not in other.what:
                        continue
                    found = time_one(row, one, bases)
                    found["setting"] = f"{other.name} {tuple(other.settings[which])}" if other is not None else None
                    table.append(found)
                    value = (
                        f"{found['us']:.0f} us" if "us" in found else f"{found['ms']:.3f} ms {found['measured']:.2f}x"
                    )
                    print(
                        f"{row.name:<34} {one.name:<26} {value:<22} was {one.now}, target {one.target}"
                        f" {found.get('extra MiB', '')} MiB {found['setting'] or ''}",
                        flush=True,
                    )
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            words = f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
            table.append({"row": row.name, "failed": words, "setting": str(other.settings[which]) if other else None})
            print("FAILED", row.name, table[-1]["setting"] or "", words, flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({**device(), "rows": table}, indent=1) + "\n")
    return table


def main() -> int:
    """Parse the command line and run what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=float, default=0.0, help="seconds for checks against the definition")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds, checks included")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.time()
    print(device(), flush=True)
    wrong = 0
    if args.check:
        wrong = sum(group.failed for group in gpu_groups.check(args.check, CHECKED).values())
    run(args.sweep, args.tiny, began, args.limit, args.out)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
