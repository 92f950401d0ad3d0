"""Rows, output and columns at 65,536 tokens: ratios of medians to SDPA, beside those that ``results`` holds."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headscope.kernels import replay
from headscope.kernels.benchmarks.clock import median
from headscope.kernels.benchmarks.timed import kinds, tensors
from headscope.kernels.hopper import dispatch as hopper
from headscope.kernels.masks import Mask

NAMES = ("rows", "output", "fused", "columns: sum")
WAYS = {"default": None, "triton": None, "triton, chunks": Mask(chunk=8192)}  # whose kernels, and under which mask
KNOWN = Path(__file__).parent / "results" / "nvidia-h100-80gb-hbm3.json"
_TAKES = hopper.takes


def _runs(way: str, n: int, d: int) -> dict[str, Callable[[], Any]]:
    """What is timed at ``n`` tokens; Triton's kernels also where Hopper's would run, if ``way`` says so."""
    replay.forget()
    hopper.takes = _TAKES if way == "default" else lambda *_, **__: False
    return kinds(*tensors(n, n, d), WAYS[way])


def _build(job: tuple[str, int, str]) -> None:
    way, d, name = job
    _runs(way, 2048, d)[name]()
    torch.cuda.synchronize()


def compare() -> list[dict[str, Any]]:
    """Time every name by Hopper's kernels (where there are), by Triton's, and by Triton's under chunks."""
    jobs = [(way, d, name) for way in WAYS for d in (128, 64) for name in NAMES]
    with mp.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:  # into Triton's cache
        list(pool.imap_unordered(_build, jobs))
    known = json.loads(KNOWN.read_text())["times"]
    before = {(row["queries"], row["d"], row["kind"]): row.get("ratio") for row in known}
    bases = {d: median(_runs("default", 65536, d)["sdpa"]) for d in (128, 64)}
    table = []
    for way, d, name in jobs:
        ms = median(_runs(way, 65536, d)[name], 0.4, fewest=3)
        then = before.get((65536, d, name)) if way == "default" else None
        table.append({"d": d, "kind": name, "by": way, "ms": ms, "ratio": ms / bases[d], "ratio on an H100": then})
        print(f"d {d:<4} {way:<15} {name:<14} {ms:9.3f} ms {ms / bases[d]:5.2f}x, {then} on an H100", flush=True)
    hopper.takes = _TAKES
    return table
