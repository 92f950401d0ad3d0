"""Check every kernel on the GPU against the definition, then time it against SDPA on the same tensors.

    python kernels/benchmarks/gpu.py --check --time --out kernels/benchmarks/results
    python kernels/benchmarks/gpu.py --check --compare --limit 300 --out DIRECTORY

``--check`` exits with 1 if any result is out of bounds, and ends after ``--limit`` seconds (``gpu_groups``);
``--compare`` times kernels at 65,536 tokens beside the ratios in ``results`` (``gpu_compare``); what both found is
written to DEVICE-checks.json. With 1 exit, too, wrong results of ``--long``, a million tokens, and ``--few``, for
``compute-sanitizer``. ``--tune`` times every tile size of ``CANDIDATES``: so ``triton_tuning`` was chosen. Times are
medians of one run; a ratio is to torch's SDPA with its default backend.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from headscope.kernels import attention, replay
from headscope.kernels import gpu_passes as passes
from headscope.kernels.benchmarks import gpu_groups
from headscope.kernels.benchmarks.clock import AHEAD, median
from headscope.kernels.benchmarks.gpu_check import WORKERS, check_few, check_long
from headscope.kernels.benchmarks.gpu_compare import compare
from headscope.kernels.benchmarks.timed import HEADS, KV_HEADS, Tensors, kinds, tensors
from headscope.kernels.hopper import dispatch as hopper
from headscope.kernels.masks import Mask
from headscope.kernels.request import Columns, Request
from headscope.kernels.scores import Scores
from headscope.kernels.triton import tuning as triton_tuning
from headscope.kernels.triton.tuning import Tiles

TILES = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (128, 128, 4)]
SHAPES = [(n, n, d) for d in (128, 64) for n in (16384, 65536)] + [(1, 131072, 128)]  # queries, keys, d_head
CANDIDATES = {
    kind: [Tiles(*tile, stages, registers) for tile in TILES for stages in (2, 3) for registers in (False, True)]
    for kind in ("rows: lse, entropy", "rows", "fused", "columns: sum")
}


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` captured once and replayed: no launch overhead."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def eager_maps() -> list[dict[str, Any]]:
    """Row and column statistics from dense maps, one head at a time, against ours: time and peak memory."""
    q, k, v, flags = tensors(16384, 16384, 128)
    mask = Mask.causal()

    def eager(columns: torch.Tensor) -> None:
        hidden = torch.ones(16384, 16384, dtype=torch.bool, device="cuda").triu_(1)
        for h in range(HEADS):
            s = (q[0, h] @ k[0, h * KV_HEADS // HEADS].T).float() * 128**-0.5
            p = s.masked_fill_(hidden, -torch.inf).softmax(-1)
            torch.special.entr(p).sum(-1), p.sum(0), p.to(torch.bfloat16) @ columns

    def ours(columns: torch.Tensor) -> None:
        request = Request(output=False, entropy=True, linear=columns, columns=(Columns(sum=True),))
        attention.attend(Scores(q, k, mask, 128**-0.5), v, request=request)

    table = []
    spans = torch.arange(16384, device="cuda")[:, None] // 4096 == torch.arange(3, device="cuda")
    runs: dict[str, Callable[[], Any]] = {
        "eager maps, 16 linear": partial(eager, flags),
        "ours, 16 linear": partial(ours, flags),
        "eager maps, 3 spans": partial(eager, spans.to(q.dtype)),
        "ours, 3 spans": partial(ours, spans),
    }
    for name, run in runs.items():
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20
        table.append({"queries": 16384, "keys": 16384, "d": 128, "kind": name, "ms": median(run), "extra MiB": extra})
        print(f"{name:<22} {table[-1]['ms']:9.3f} ms, {extra:9.1f} MiB beyond the inputs", flush=True)
    return table


def measure() -> list[dict[str, Any]]:
    """Times of every kind at every shape, with the ratio to SDPA on the same tensors."""
    table = []
    for queries, keys, d in SHAPES:
        base, every = 0.0, kinds(*tensors(queries, keys, d))
        if queries == 1:  # launches outweigh the work: time the work by replaying a graph, too
            every |= {f"{name}, graph": graphed(run) for name, run in list(every.items())}
        for name, run in every.items():
            ms = median(run, ahead=0 if queries == 1 else AHEAD)  # decoding waits for Python
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
                    timed.append((median(_with(kind, tiles, data), 0.1) / base, tiles))
                except Exception as error:  # out of registers or shared memory: not a candidate
                    print(kind, d, tiles, type(error).__name__)
            for ratio, tiles in sorted(timed)[:5]:
                print(f"{kind:<18} d {d:<4} {ratio:5.2f}x {tuple(tiles)}", flush=True)


def _with(kind: str, tiles: Tiles, data: Tensors) -> Callable[[], Any]:
    replay.forget()
    hopper.takes = lambda *_, **__: False  # it is Triton's tiles that are tuned
    triton_tuning.row_tiles = lambda *_: tiles
    triton_tuning.column_tiles = lambda *_: tiles
    return kinds(*data)[kind]


def _compile(job: tuple[str, int, Tiles]) -> None:
    kind, d, tiles = job
    small = tensors(2048, 2048, d)
    try:
        if kind == "columns: sum":
            lse = torch.zeros(1, HEADS, 2048, device="cuda")
            _with("rows", tiles, tensors(16, 16, d))
            passes.columns(small[0], small[1], lse, mask=Mask.causal(), scale=d**-0.5)
        else:
            _with(kind, tiles, small)()
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


def report(table: list[dict[str, Any]]) -> str:
    """The measurements as a page."""
    lines = [
        f"# {device()['device']}",
        "",
        ", ".join(f"{name} {x}" for name, x in device().items() if name != "device"),
    ]
    lines += [
        "",
        f"bfloat16, causal, {HEADS} query heads, {KV_HEADS} key/value heads, random inputs; medians of one run of",
    ]
    lines += [
        "`gpu.py --time`; ratios to torch SDPA's default forward on the same tensors. `rows` is lse, entropy and 16"
    ]
    lines += [
        "linear statistics of random keys, `fused` the same with the output, `16 spans` of contiguous ones. Work is",
        "queued before it is due, but for single queries, where `graph` replays a CUDA graph instead.",
        "",
    ]
    lines += ["| queries x keys | d | what | ms | of SDPA |", "|---|---|---|---|---|"]
    for row in table:
        ratio = f"{row['ratio']:.2f}x" if "ratio" in row else f"{row['extra MiB']:.0f} MiB extra"
        lines.append(f"| {row['queries']} x {row['keys']} | {row['d']} | {row['kind']} | {row['ms']:.3f} | {ratio} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, ending: str, text: str) -> None:
    """Write a file named after the card."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{torch.cuda.get_device_name().lower().replace(' ', '-')}{ending}").write_text(text)


def main() -> int:
    """Parse the command line and run what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("check", "compare", "few", "long", "time", "tune"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for --check")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(device())
    right = True
    if args.check or args.compare:
        times = compare() if args.compare else []  # first: on an idle card
        found = gpu_groups.check(args.limit) if args.check else {}
        right = not any(group.failed for group in found.values())
        if args.out:
            listed = {name: vars(group) for name, group in found.items()}
            write(args.out, "-checks.json", json.dumps({**device(), "groups": listed, "times": times}, indent=1) + "\n")
    right &= check_few() if args.few else True
    right &= check_long() if args.long else True
    if args.tune:
        tune()
    if args.time:
        table = measure() + eager_maps()
        if args.out:
            write(args.out, ".json", json.dumps({**device(), "times": table}, indent=1) + "\n")
            write(args.out, ".md", report(table))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
