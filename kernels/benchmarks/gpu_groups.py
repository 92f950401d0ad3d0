"""Every check on the card in named groups, until a limit of seconds: what passed, what failed, what had no time.

The checks that no other file has: every mask rule at every width, widths that the copy engine cannot fetch, padding
around the tiles, features of any size, blocks of any size twice, kernels that do not compile (``gpu_jobs`` lists the
calls). Workers share Triton's cache; compiling takes most of the time.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from headscope.kernels import gpu_engine, replay
from headscope.kernels.benchmarks import gpu_check, gpu_check_edits
from headscope.kernels.benchmarks.gpu_jobs import DTYPE, KERNELS, Job, groups
from headscope.kernels.blocks import blocks
from headscope.kernels.checks.broken import Broken
from headscope.kernels.checks.cases import everything, random_case
from headscope.kernels.checks.compare import compare, tensors
from headscope.kernels.fallback import EngineWarning
from headscope.kernels.request import Columns, Request
from headscope.kernels.triton import tuning
from headscope.kernels.triton.tuning import Tiles

DEVICE = "cuda"


@dataclass
class Group:
    """What became of the calls of one group."""

    calls: int
    passed: int = 0
    failed: int = 0
    no_time: int = 0
    wrong: list[str] = field(default_factory=list)


def narrow(spec: dict[str, Any]) -> list[str]:
    """Lse, entropy and the output in a pass, and column sums and maxima: the fewest kernels that hold every rule."""
    case = random_case(**spec, device=DEVICE)
    asked = [Request(lse=True, entropy=True, columns=(Columns(sum=True, max=True),))]
    if case.bias is not None:  # which rows without the output add in another way than columns
        asked.append(Request(output=False, lse=True, max=True, entropy=True))
    wrong = []
    for request in asked:
        got, again = (case.run(gpu_engine.attend, request) for _ in range(2))
        wrong += [f"{spec}: {verdict}" for verdict in compare(got, case, request) if not verdict.holds]
        for name, x in tensors(got).items():
            if not torch.equal(x, tensors(again)[name]):
                wrong.append(f"{spec}: {name} differs between two runs")
    return wrong


def features(spec: dict[str, Any]) -> list[str]:
    """Columns of random numbers of a size, of one number, and (size 0) of numbers from 1e-12 to 1e12."""
    size = spec["size"]
    case = random_case(**{name: x for name, x in spec.items() if name != "size"}, device=DEVICE)
    keys, gen = case.k.shape[2], torch.Generator().manual_seed(0)
    spread = torch.logspace(-12, 12, keys)[torch.randperm(keys, generator=gen)]
    columns = torch.stack([size * torch.randn(keys, generator=gen), torch.full((keys,), size)], -1) if size else spread
    linear = columns.view(keys, -1).to(DEVICE)
    request = Request(output=False, linear=linear)
    got, want = case.run(gpu_engine.attend, request).linear, case.eager(request).linear
    assert got is not None and want is not None
    # half precision keeps 2^-12 (bfloat16: 2^-9) of a weight, and of the scores' roundings nothing is kept here
    unit = 2.0**-11 if case.q.dtype == torch.float16 else 2.0**-8
    bound = unit * (case.pattern() @ linear.abs().double()) + linear.abs().double().sum(0) * 2.0**-24
    over = float(((got - want).abs() / bound).max())
    return [] if over <= 1.0 else [f"{spec}: {over} times the bound"]


def repeated(spec: dict[str, Any]) -> list[str]:
    """Maps of blocks, twice."""
    size = spec["size"]
    case = random_case(**{name: x for name, x in spec.items() if name != "size"}, device=DEVICE)
    maps = [blocks(case, size=size) for _ in range(3)]
    return [] if all(torch.equal(maps[0], other) for other in maps[1:]) else [f"{spec}: a map differs between runs"]


def broken(spec: dict[str, Any]) -> list[str]:
    """A kernel whose compiler fails: everything is right all the same, with a warning, also the second time."""
    name, wrong = spec["name"], []
    d, n = (128, 1100) if name.startswith("hopper") else (80, 70)
    case = random_case("causal", batch=1, queries=n, keys=n, d_head=d, dtype=DTYPE, device=DEVICE)
    request = everything(case, top=5)
    replay.forget()
    with ExitStack() as patches, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if name in KERNELS:
            patches.enter_context(patch.object(KERNELS[name], "_kernel", Broken()))
        else:  # a failure of the real compiler: more shared memory than there is
            patches.enter_context(patch.object(tuning, "row_tiles", lambda *_: Tiles(256, 256, 8, 6)))
        for _ in range(2):
            got = case.run(gpu_engine.attend, request)
            wrong += [f"{name}: {verdict}" for verdict in compare(got, case, request) if not verdict.holds]
    found = [str(x.message) for x in said if issubclass(x.category, EngineWarning)]
    print(f"{name}: {len(found)} warnings, the first: {found[0] if found else None}", flush=True)
    return wrong if found else [*wrong, f"{name}: no warning"]


def both(spec: dict[str, Any]) -> list[str]:
    """All that ``gpu_check`` asks."""
    return gpu_check.check_one(spec) + gpu_check.check_pairs(spec)


CHECKS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "narrow": narrow,
    "features": features,
    "blocks": repeated,
    "broken": broken,
    "all": both,
    "again": gpu_check.check_again,
    "pairs": gpu_check.check_pairs,
    "same": gpu_check_edits.check_equal,
    **gpu_check_edits.CHECKS,
}


def _guarded(job: Job) -> list[str]:
    torch.set_num_threads(1)
    kind, spec = job
    allocate = torch.empty
    replay.forget()
    if kind not in ("edits", "again"):  # the compiler of FlexAttention allocates, too; the other poisons in time
        gpu_check.poison()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", EngineWarning)  # no check passes because another engine answered
            return CHECKS[kind](spec)
    except Exception as error:  # one broken case must not hide the others
        return [f"{kind} {spec}: {type(error).__name__}: {str(error)[:600]}"]
    finally:
        torch.empty = allocate


def check(limit: float = 3600.0, names: Sequence[str] = ()) -> dict[str, Group]:
    """Run the groups ``names``, or every group, several calls at a time, for ``limit`` seconds."""
    began, jobs = time.time(), groups()
    jobs = {name: jobs[name] for name in names or jobs}
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # each worker compiles by itself
    found = {name: Group(len(every)) for name, every in jobs.items()}
    with mp.get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        pending = [(name, job, pool.apply_async(_guarded, (job,))) for name, every in jobs.items() for job in every]
        for name, _job, result in pending:
            group = found[name]
            try:
                wrong = result.get(max(0.001, limit - (time.time() - began)))
            except mp.TimeoutError:
                group.no_time += 1
                continue
            group.passed, group.failed = group.passed + (not wrong), group.failed + bool(wrong)
            group.wrong += wrong
            for line in wrong:
                print("WRONG", line, flush=True)
    for name, group in found.items():
        print(
            f"{'FAIL' if group.failed else 'pass' if not group.no_time else 'part':<5}{name:<32} {group.passed} passed,"
            f" {group.failed} failed, {group.no_time} had no time"
        )
    print(f"{time.time() - began:.0f} s", flush=True)
    return found
