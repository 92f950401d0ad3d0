"""Check every Triton kernel on the GPU against the definition, then time it against SDPA on the same tensors.

    python kernels/benchmarks/h100.py --check --time --out kernels/benchmarks/results

``--check`` exits with 1 if any result is out of bounds. ``--tune`` times every tile size of ``CANDIDATES``: so
``triton_tuning`` was chosen. Times are medians of one run; a ratio is to torch's SDPA with its default backend.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

from headscope.kernels import attention, triton_engine, triton_rows, triton_tuning
from headscope.kernels.checks import MASKS, compare, everything, random_case
from headscope.kernels.masks import Mask
from headscope.kernels.request import Request
from headscope.kernels.triton_columns import columns
from headscope.kernels.triton_tuning import Tiles

HEADS, KV_HEADS = 32, 8
WORKERS = 12
TILES = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (128, 128, 4)]
CANDIDATES = {
    kind: [Tiles(*tile, stages, registers) for tile in TILES for stages in (2, 3) for registers in (False, True)]
    for kind in ("rows: lse, entropy", "rows", "fused", "columns: sum")
}


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
    return every


def check_one(spec: dict[str, Any]) -> list[str]:
    """What is wrong with one case, as lines; empty if nothing is."""
    wrong = []
    for subset in (False, True):
        case = random_case(**spec, device="cuda")
        request = everything(case, subset=subset, top=0)
        got = case.run(triton_engine.attend, request)
        again = case.run(triton_engine.attend, request)
        for verdict in compare(got, case, request):
            if not verdict.holds:
                wrong.append(f"{spec} subset={subset}: {verdict}")
        for name, x in vars(got).items():
            if isinstance(x, torch.Tensor) and not torch.equal(x, getattr(again, name)):
                wrong.append(f"{spec} subset={subset}: {name} differs between two runs")
    return wrong


def _guarded(spec: dict[str, Any]) -> list[str]:
    torch.set_num_threads(1)
    _poison()
    try:
        return check_one(spec)
    except Exception as error:  # one broken case must not hide the others
        return [f"{spec}: {type(error).__name__}: {str(error)[:600]}"]


def _poison() -> None:
    allocate = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = allocate(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    torch.empty = poisoned


def check() -> bool:
    """Run every case, several at a time (compilation dominates)."""
    began, every = time.time(), cases()
    with mp.get_context("spawn").Pool(WORKERS) as pool:
        wrong = [line for lines in pool.imap_unordered(_guarded, every) for line in lines]
    for line in wrong:
        print("WRONG", line)
    print(f"checked {2 * len(every)} calls in {time.time() - began:.0f} s: {len(wrong)} results out of bounds")
    return not wrong


def median(run: Callable[[], Any], budget: float = 1.0) -> float:
    """Median milliseconds of ``run``, timed with events, each time on a flushed L2, for about ``budget`` seconds."""
    run()
    torch.cuda.synchronize()
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 1e3 * budget and len(times) < 100):
        flush.zero_()
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        run()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b))
    return statistics.median(times)


def tensors(queries: int, keys: int, d: int, heads: int = HEADS, kv: int = KV_HEADS) -> tuple[torch.Tensor, ...]:
    """Random bf16 q, k, v and 16 span indicators."""
    gen = torch.Generator("cuda").manual_seed(0)
    shapes = ((1, heads, queries, d), (1, kv, keys, d), (1, kv, keys, d))
    q, k, v = (torch.randn(s, generator=gen, device="cuda", dtype=torch.bfloat16) for s in shapes)
    flags = (torch.rand(keys, 16, generator=gen, device="cuda") < 0.1).to(torch.bfloat16)
    return q, k, v, flags


def kinds(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flags: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; ``sdpa`` is the yardstick."""
    keys, queries = k.shape[2], q.shape[2]
    mask, scale = Mask.causal(keys - queries), q.shape[-1] ** -0.5
    call = {"mask": mask, "scale": scale}

    def rows(wants: set[str], values: torch.Tensor | None = None) -> Callable[[], Any]:
        features = flags if "linear" in wants else None
        return lambda: triton_rows.rows(q, k, values, features=features, wants=frozenset(wants), **call)

    statistics_ = {"lse", "entropy", "linear"}
    every: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True),
        "rows: lse": rows({"lse"}),
        "rows: lse, entropy": rows({"lse", "entropy"}),
        "rows": rows(statistics_),
        "output": rows({"output"}, v),
        "fused": rows(statistics_ | {"output"}, v),
    }
    if queries == keys:
        lse = triton_rows.rows(q, k, None, **call).lse
        assert lse is not None
        every["columns: sum"] = lambda: columns(q, k, lse, **call)
        every["columns: sum, max"] = lambda: columns(q, k, lse, highest=True, **call)
        request = Request(output=False, key_sum=True)
        every["columns incl. lse"] = lambda: attention.attend(q, k, v, request=request, **call)
    return every


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` captured once and replayed: no launch overhead."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure() -> list[dict[str, Any]]:
    """Times of every kind at every shape, with the ratio to SDPA on the same tensors."""
    table = []
    for queries, keys, d in ((16384, 16384, 128), (65536, 65536, 128), (16384, 16384, 64), (1, 131072, 128)):
        base, every = 0.0, kinds(*tensors(queries, keys, d))
        if queries == 1:  # launches outweigh the work: time the work by replaying a graph, too
            every |= {f"{name}, graph": graphed(run) for name, run in every.items()}
        for name, run in every.items():
            ms = median(run)
            base = ms if name.startswith("sdpa") else base
            table.append({"queries": queries, "keys": keys, "d": d, "kind": name, "ms": ms, "ratio": ms / base})
            print(f"{queries:>7} x {keys:<7} d {d:<4} {name:<22} {ms:9.3f} ms  {ms / base:5.2f}x", flush=True)
    return table


def tune() -> None:
    """Time every candidate; compiled beforehand, in parallel, into Triton's cache."""
    jobs = [(kind, d, tiles) for kind in CANDIDATES for d in (128, 64) for tiles in CANDIDATES[kind]]
    with mp.get_context("spawn").Pool(WORKERS) as pool:
        list(pool.imap_unordered(_compile, jobs))
    for kind in CANDIDATES:
        for d in (128, 64):
            data = tensors(16384, 16384, d)  # the names of CANDIDATES are those of kinds()
            base = median(kinds(*data)["sdpa"], 0.2)
            timed = []
            for tiles in CANDIDATES[kind]:
                try:
                    timed.append((median(_with(kind, tiles, *data), 0.1) / base, tiles))
                except Exception as error:  # out of registers or shared memory: not a candidate
                    print(kind, d, tiles, type(error).__name__)
            for ratio, tiles in sorted(timed)[:5]:
                print(f"{kind:<18} d {d:<4} {ratio:5.2f}x {tuple(tiles)}", flush=True)


def _with(kind: str, tiles: Tiles, *data: torch.Tensor) -> Callable[[], Any]:
    triton_tuning.row_tiles = lambda *_: tiles
    triton_tuning.column_tiles = lambda *_: tiles
    return kinds(*data)[kind]


def _compile(job: tuple[str, int, Tiles]) -> None:
    kind, d, tiles = job
    small = tensors(2048, 2048, d)
    try:
        if kind == "columns: sum":
            lse = torch.zeros(1, HEADS, 2048, device="cuda")
            _with("rows", tiles, *tensors(16, 16, d))
            columns(small[0], small[1], lse, mask=Mask.causal(), scale=d**-0.5)
        else:
            _with(kind, tiles, *small)()
        torch.cuda.synchronize()
    except Exception:  # reported when it is timed
        pass


def device() -> dict[str, str]:
    """What the numbers were measured on."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }


def main() -> int:
    """Parse the command line and run what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("check", "time", "tune"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(device())
    right = check() if args.check else True
    if args.tune:
        tune()
    if args.time:
        table = measure()
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            name = torch.cuda.get_device_name().lower().replace(" ", "-")
            (args.out / f"{name}.json").write_text(json.dumps({**device(), "times": table}, indent=1))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
