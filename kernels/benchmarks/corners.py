"""Time the corners in which a kernel could be slow, each beside SDPA's default on the same tensors and its target.

    python kernels/benchmarks/corners.py --check 120 --limit 400 --sweep --out h200-corners.json

A row of ``corner_list`` that fails says so and stops no other. Results are printed and saved row by row; after
``--limit`` seconds the rows that are left are named. ``--rows host`` times one of them: the host's time says something
where nothing else runs on the machine. ``--check``: first, for so many seconds, the kernels that the rows
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
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from headscope.kernels import fallback, replay
from headscope.kernels.benchmarks import gpu_groups
from headscope.kernels.benchmarks.clock import median
from headscope.kernels.benchmarks.corner_list import ROWS, SWEEPS, Row, Sweep
from headscope.kernels.benchmarks.corner_rows import Timed
from headscope.kernels.benchmarks.pages import machine

CHECKED = (
    "Hopper's widths and options",
    "float32",
    "maps and divergences",
    "moved mass and spans",
    "top keys, few queries",
    "edited scores",
    "calls that come again",
)
LONGEST = 60.0  # seconds for a row
Job = tuple[int, int, int]  # row, sweep or -1, its setting


def about_run() -> dict[str, Any]:
    """What makes a table of the rows: see ``pages``."""
    command = " ".join(["python kernels/benchmarks/corners.py", *sys.argv[1:]])
    return {"kind": "corners", "machine": machine(), "command": command}


@contextmanager
def setting(sweep: Sweep | None, number: int) -> Iterator[None]:
    """Within the block, a kernel's tiles are the sweep's."""
    with ExitStack() as patches, warnings.catch_warnings():
        warnings.simplefilter("error", fallback.EngineWarning)  # it is this kernel that is timed, or none
        fallback._FAILED.clear()  # tiles that are too large say nothing of others
        replay.forget()
        if sweep is not None:
            patches.enter_context(patch.object(sweep.module, sweep.name, lambda *_: sweep.settings[number]))
        yield


def jobs(keys: list[str], sweep: bool) -> list[Job]:
    """What is timed of the rows ``keys``, in order: rows, then their other tiles."""
    rows = {row.key: n for n, row in enumerate(ROWS) if row.key in keys}
    listed = [(n, -1, 0) for n in rows.values()]
    if sweep:
        listed += [(rows[s.row], n, i) for n, s in enumerate(SWEEPS) if s.row in rows for i in range(len(s.settings))]
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


def say(found: dict[str, Any]) -> None:
    """Print a measurement."""
    value = f"{found['us']:.0f} us" if "us" in found else f"{found['ms']:.3f} ms {found['measured']:.2f}x"
    asked = f"was {found['now'] or '-'}, target {found['target']}"
    rest = f"{found.get('extra MiB', 0):.0f} MiB {found['setting'] or ''}"
    print(f"{found['row']:<32} {found['what']:<26} {value:<19} {asked:<25} {rest}", flush=True)


def measure(job: Job, less: int, bases: dict[Any, float]) -> tuple[list[dict[str, Any]], dict[Any, float]]:
    """The measurements of a row, or of what a sweep is about, and SDPA's times."""
    row, sweep = ROWS[job[0]], SWEEPS[job[1]] if job[1] >= 0 else None
    found = []
    with setting(sweep, job[2]):
        for one in row.make(less):
            if sweep is None or one.name in sweep.what:
                found.append(time_one(row, one, bases) | {"setting": named(job)})
                say(found[-1])
    return found, bases


def named(job: Job) -> str | None:
    """A sweep's setting, as it is printed."""
    return None if job[1] < 0 else f"{SWEEPS[job[1]].name} {tuple(SWEEPS[job[1]].settings[job[2]])}"


def build_all(listed: list[Job], until: float) -> None:
    """Build every job's kernels, several at a time."""
    with mp.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        pending = [pool.apply_async(build, ((job, until),)) for job in listed]
        for job, result in zip(listed, pending, strict=True):
            try:
                words = result.get(max(0.1, until + 15.0 - time.time()))
            except mp.TimeoutError:  # a kernel that hangs, or a compiler that took its process down
                words = "no answer"
            if words:
                print(f"not built: {ROWS[job[0]].name} {named(job) or ''}: {words}", flush=True)


def run(listed: list[Job], tiny: bool, began: float, limit: float, out: Path | None) -> None:
    """Time every job until the limit, in a process that is replaced where a row fails or takes a minute."""
    less = 64 if tiny else 1
    table: list[dict[str, Any]] = []
    bases: dict[Any, float] = {}
    if not tiny:
        build_all(listed, began + 0.55 * limit)
        print(f"{time.time() - began:.0f} s, kernels are built", flush=True)
    pool: Any = None
    for job in listed:
        about = {"row": ROWS[job[0]].name, "setting": named(job)}
        if time.time() - began > limit:
            table.append(about | {"no time": True})
            print("no time:", *about.values(), flush=True)
            continue
        pool = pool or mp.get_context("spawn").Pool(1)
        try:
            found, bases = pool.apply_async(measure, (job, less, bases)).get(LONGEST)
            table += found
        except Exception as error:
            words = f"{type(error).__name__}: {str(error)[:300]}"
            table.append(about | {"failed": words})
            print("FAILED", *about.values(), words, flush=True)
            pool.terminate()
            pool = None
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({**about_run(), "rows": table}, indent=1) + "\n")
    if pool is not None:
        pool.terminate()


def main() -> int:
    """Parse the command line and run what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=float, default=0.0, help="seconds for checks against the definition")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds, checks included")
    keys = [row.key for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=keys, default=keys, metavar="KEY", help="some of the rows, by key")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.time()
    print(machine(), flush=True)
    wrong = 0
    if args.check:
        wrong = sum(group.failed for group in gpu_groups.check(args.check, CHECKED).values())
    run(jobs(args.rows, args.sweep), args.tiny, began, args.limit, args.out)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
