"""Every Triton kernel on the GPU against the float64 definition, on poisoned memory, twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from headscope.kernels import gpu_engine as triton_engine
from headscope.kernels import replay
from headscope.kernels.blocks import Pool, blocks, dense
from headscope.kernels.checks.cases import MASKS, everything, random_case
from headscope.kernels.checks.compare import allowed, compare, distance, tensors
from headscope.kernels.divergence import dense as dense_divergence
from headscope.kernels.divergence import divergence
from headscope.kernels.gpu_passes import columns, rows
from headscope.kernels.masks import Mask
from headscope.kernels.request import Columns, Request

WORKERS = 12


def cases() -> list[dict[str, Any]]:
    """Calls that reach every branch: each mask, dtype, awkward width and logit option; one and few queries."""
    options = {"softcap": 5.0, "sinks": True, "bias": True}
    base = {"dtype": torch.bfloat16, "d_head": 64, "queries": 333, "keys": 333}
    every: list[dict[str, Any]] = [{**base, "kind": kind} for kind in MASKS]
    every += [{**base, "kind": kind, "queries": 1, "keys": 700} for kind in ("causal", "window", "left padding")]
    every += [{**base, "kind": kind, "queries": 5, "keys": 1500, **options} for kind in ("causal", "chunks")]
    for d, dv in ((16, 16), (60, 60), (80, 80), (96, 128), (128, 128), (128, 64), (256, 256)):
        every.append({**base, "kind": "causal", "d_head": d, "d_value": dv, "queries": 200, "keys": 457})
    for dtype in (torch.float16, torch.float32):
        every += [{**base, "kind": kind, "dtype": dtype} for kind in ("causal", "window", "right padding", "segments")]
        every.append({**base, "kind": "causal", "dtype": dtype, "d_head": 256, "queries": 63, "keys": 130})
        every.append({**base, "kind": "causal", "dtype": dtype, "queries": 1, "keys": 3000})
    for name in options:
        every.append({**base, "kind": "causal", name: options[name]})
    every += [{**base, "kind": kind, **options} for kind in ("causal", "window", "full")]
    return every + for_hopper()


def for_hopper() -> list[dict[str, Any]]:
    """Calls that the kernels for Hopper take; the longest also with some of their rows."""
    kinds = [kind for kind in MASKS if kind != "rule"]
    every: list[dict[str, Any]] = []
    for d in (64, 128):
        base = {"dtype": torch.bfloat16, "d_head": d, "queries": 1100, "keys": 1100}
        every += [{**base, "kind": kind} for kind in kinds]
        every += [{**base, "kind": kind, "sinks": True, "features": 10} for kind in ("causal", "left padding")]
        every += [{**base, "kind": kind, "features": 0} for kind in ("causal", "window", "left padding")]
        every.append({**base, "kind": "causal", "dtype": torch.float16, "queries": 1030, "keys": 1700})
        every += [{**base, "kind": kind, "batch": 1, "queries": 3300, "keys": 3300} for kind in ("causal", "window")]
        every.append({**base, "kind": "causal", "batch": 1, "queries": 1100, "keys": 3300, "features": 0})
    return every


def check_one(spec: dict[str, Any]) -> list[str]:
    """What is wrong with one case, as lines; empty if nothing is."""
    wrong = []
    spec = dict(spec)
    features = spec.pop("features", 3)
    for subset in (False, True):
        case = random_case(**spec, device="cuda")
        request = everything(case, subset=subset, top=0, features=features)
        got = case.run(triton_engine.attend, request)
        again = case.run(triton_engine.attend, request)
        for verdict in compare(got, case, request):
            if not verdict.holds:
                wrong.append(f"{spec} subset={subset}: {verdict}")
        for name, x in tensors(got).items():
            if not torch.equal(x, tensors(again)[name]):
                wrong.append(f"{spec} subset={subset}: {name} differs between two runs")
    return wrong


def check_again(spec: dict[str, Any]) -> list[str]:
    """A call that comes a third time is started as it was recorded, into room that holds poison."""
    wrong = []
    named = torch.arange(spec["queries"], device="cuda")[None, :, None] // 2
    requests = {
        "lse, entropy": Request(output=False, lse=True, entropy=True),
        "output": Request(lse=True),
        "targets": Request(output=False, targets=named),
        "columns": Request(output=False, columns=(Columns(sum=True, max=True),)),
    }
    for seed in range(3):
        if seed == 2:
            poison()
        for name, request in requests.items():
            case = random_case(**spec, seed=seed, device="cuda")
            found = compare(case.run(triton_engine.attend, request), case, request)
            wrong += [f"{spec} {name}, call {seed}: {verdict}" for verdict in found if not verdict.holds]
    recorded = sum(known is not None for known in replay._KINDS.values())
    return wrong if recorded >= len(requests) else [*wrong, f"{spec}: {recorded} of {len(requests)} were recorded"]


def check_pairs(spec: dict[str, Any]) -> list[str]:
    """The same for block maps and for the distance from a second call under the same mask."""
    spec = {name: x for name, x in spec.items() if name != "features"}
    a = random_case(**spec, device="cuda")
    b = replace(random_case(**spec, seed=1, device="cuda"), mask=a.mask, sinks=a.sinks)
    size, wrong = max(a.score_size(), b.score_size()), []

    def hold(name: str, got: torch.Tensor, want: torch.Tensor, low: torch.Tensor) -> None:
        error, limit = distance(got, want), allowed(low, want, size=size)
        if not error <= limit:
            wrong.append(f"{spec}: {name} is off by {error}, allowed {limit}")

    pools: tuple[tuple[Pool, int], ...] = (("sum", 16), ("max", 64), ("mean", 256))
    for pool, width in pools:
        got = blocks(a, size=width, pool=pool)
        patterns = (a.pattern(), a.pattern(a.q.dtype).double())
        want, low = (dense(p, a.mask, width, pool) for p in patterns)
        hold(f"blocks {pool} {width}", got, want, low)
    if a.bias is None:
        apart = divergence(a, b)
        exact = dense_divergence(a.log_pattern(), b.log_pattern())
        eager = dense_divergence(a.log_pattern(a.q.dtype), b.log_pattern(b.q.dtype))
        for name, x, y, z in zip(apart._fields, apart, exact, eager, strict=True):
            hold(name, x, y, z)
    return wrong


def poison() -> None:
    """Fill what ``torch.empty`` gives with NaN, in this process, and the room of calls that come again."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return wrapper

    torch.empty = poisoned(torch.empty)
    replay._EMPTY = {kind: make and poisoned(make) for kind, make in replay._EMPTY.items()}


def check_few() -> bool:
    """Every ninth case, in this process: what ``compute-sanitizer`` can follow, at half a minute a case."""
    poison()
    right = True
    for spec in cases()[::9]:
        wrong = check_one(spec) + check_pairs(spec)
        print("\n".join(wrong) or f"right: {spec}", flush=True)
        right &= not wrong
    return right


def check_long() -> bool:
    """A million tokens, more than 2^31 numbers in q: the last rows and columns against float64."""
    n, heads, d, last = 1 << 20, 32, 64, 256
    gen = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, heads, n, d, generator=gen, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 8, n, d, generator=gen, device="cuda", dtype=torch.bfloat16)
    call: dict[str, Any] = {"mask": Mask.causal(), "scale": d**-0.5}
    began = time.time()
    got = rows(q, k, None, wants=frozenset({"lse", "entropy"}), **call)
    assert got.lse is not None and got.entropy is not None
    sums, _ = columns(q, k, got.lse, queries=(n - last, n), **call)
    assert sums is not None
    torch.cuda.synchronize()
    took, right = time.time() - began, True
    for h in (0, heads - 1):
        s = (q[0, h, -last:].double() @ k[0, h // 4].double().T) * d**-0.5
        s.masked_fill_(torch.arange(n, device="cuda") > torch.arange(n - last, n, device="cuda")[:, None], -torch.inf)
        lse = torch.logsumexp(s, -1)
        p = (s - lse[:, None]).exp_()
        apart = {
            "lse": distance(got.lse[0, h, -last:], lse),
            "entropy": distance(got.entropy[0, h, -last:], torch.special.entr(p).sum(-1)),
            "columns": distance(sums[0, h], p.sum(0)) / float(p.sum(0).max()),
        }
        right &= all(error < 1e-4 for error in apart.values())
        print(f"{n} tokens, {heads} heads, d {d}, head {h}: {apart}")
    print(f"rows of {n} tokens and columns over the last {last} queries, compilation included: {took:.1f} s")
    return right
