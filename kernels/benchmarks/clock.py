"""How the benchmarks time a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]
AHEAD = 2_000_000  # cycles, about a millisecond: longer than Python takes to launch what is timed
L2 = 256 << 20  # bytes: more than a card's second-level cache


def median(run: Run, budget: float = 1.0, *, fewest: int = 5, ahead: int = AHEAD) -> float:
    """Median milliseconds of ``run``, for about ``budget`` seconds; on a GPU by events, each time on a flushed L2.

    A GPU sleeps for ``ahead`` cycles first, so that the work is queued before it is due, as it is within a model. With
    0, the time that Python takes to launch it counts where that is longer than the work.
    """
    gpu = torch.cuda.is_available()
    flush = torch.empty(L2, dtype=torch.int8, device="cuda") if gpu else None
    run()
    times: list[float] = []
    while len(times) < fewest or (sum(times) < 1e3 * budget and len(times) < 100):
        times.append(_seconds(run) if flush is None else _events(run, flush, ahead))
    return statistics.median(times)


def _events(run: Run, flush: torch.Tensor, ahead: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    flush.zero_()
    if ahead:
        torch.cuda._sleep(ahead)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)
