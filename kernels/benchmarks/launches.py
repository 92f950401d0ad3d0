"""Where a call's time on a card goes: microseconds of every kernel that it starts, in order, and the gaps before them.

    python kernels/benchmarks/launches.py --rows "top 2k" decode

The calls are those of ``corners.py``, as calls that came before. Medians of ``CALLS``, by torch's profiler, whose own
work makes gaps longer than they are without it; a captured graph has gaps of the card alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from headscope.kernels.benchmarks.corner_list import ROWS

CALLS = 20


class Started(NamedTuple):
    """A kernel (or a copy) on the card: microseconds."""

    name: str
    begin: float
    end: float


def launches(started: Sequence[Started], calls: int) -> list[tuple[str, float, float]]:
    """Name, median gap before and median time of each kernel of a call, of what ``calls`` equal calls started.

    Raises ValueError where they did not start the same number.
    """
    each, rest = divmod(len(started), calls)
    if rest:
        raise ValueError(f"{len(started)} kernels are not {calls} times a number: these calls differ")
    ordered = sorted(started, key=lambda one: one.begin)
    found = []
    for n in range(each):
        those = range(n, len(ordered), each)
        gaps = [ordered[at].begin - ordered[at - 1].end for at in those if n]
        took = [ordered[at].end - ordered[at].begin for at in those]
        found.append((ordered[n].name, statistics.median(gaps or [0.0]), statistics.median(took)))
    return found


def profiled(run: Any) -> list[Started]:
    """What ``CALLS`` calls of ``run`` start on the card."""
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()
    events = [one for one in seen.events() if one.device_type.name == "CUDA"]
    return [Started(one.name, one.time_range.start, one.time_range.end) for one in events]


def main() -> None:
    """Parse the command line, and print a table for every call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=["top 2k", "decode"], choices=[row.key for row in ROWS])
    args = parser.parse_args()
    for row in (row for row in ROWS if row.key in args.rows):
        for one in row.make(1):
            if one.base is None:  # microseconds of the host
                continue
            print(f"{row.name}, {one.name}")
            for name, gap, took in launches(profiled(one.run), CALLS):
                print(f"  {took:9.1f} us, {gap:6.1f} before: {name[:90]}", flush=True)


if __name__ == "__main__":
    main()
