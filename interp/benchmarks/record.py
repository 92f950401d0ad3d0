"""What putting a record together takes, beside the pass that it is of: prompts of one length, random weights.

    python interp/benchmarks/record.py --device cuda --shape 1b --out interp/benchmarks/results/h200-record.json
    python interp/benchmarks/record.py --device cpu --shape thin --prompts 8 --tokens 256

Each round times, in turn, an untraced pass, a traced pass and then the record (``tracer.record``: all examples as one
Dataset in host memory), each to its end on the device. Printed are medians in milliseconds and, over the rounds, the
median ratios to the untraced pass: of the record alone, and of what the traced pass adds. "fixed" is the record of as
many prompts of eight tokens: what it takes whatever its size (the Dataset, its provenance). The rest of a record is
copied on torch's threads (``--threads``; printed), into arrays that are prepared during the pass where a GPU computes
(``headscope.interp.tracing.rooms``), unless ``--fresh``. ``thin`` has the depth and the heads of ``1b`` and two numbers
a head, so that a pass costs little beside its record.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics as stats
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headscope.interp import trace
from headscope.interp.benchmarks.shapes import SHAPES, Shape, random_model
from headscope.interp.statistics import Distance, Entropy, KeyMass, LogSumExp, SinkMass, Statistic, TopKeys
from headscope.interp.tracing.rooms import Rooms

THIN = Shape(16, 64, 64, 32, 8, 256, True, tokens=4096)
SETS: dict[str, tuple[Statistic, ...]] = {
    "entropy": (Entropy(),),
    "four of rows": (LogSumExp(), Entropy(), SinkMass(4), Distance()),
    "key mass": (KeyMass(),),
    "top 16": (TopKeys(16),),
}


def seconds(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Wall seconds of ``run``, to its end on the device, and what it gives."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def rounds(model: Any, ids: Tensor, chosen: tuple[Statistic, ...], count: int, device: str) -> dict[str, Any]:
    """Medians over ``count`` rounds, after one that is dropped."""

    def forward() -> Any:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1)

    times: dict[str, list[float]] = {"untraced": [], "traced": [], "record": [], "fixed": []}
    size = 0
    with torch.no_grad():
        for _ in range(count + 1):
            times["untraced"].append(seconds(forward, device)[0])
            with trace(model, chosen) as tracer:
                times["traced"].append(seconds(forward, device)[0])
                took, record = seconds(partial(getattr, tracer, "record"), device)
            times["record"].append(took)
            size = sum(variable.nbytes for variable in record.data_vars.values())
            del record, tracer
            with trace(model, chosen) as tracer:
                model(input_ids=ids[:, :8], use_cache=False, logits_to_keep=1)
                times["fixed"].append(seconds(partial(getattr, tracer, "record"), device)[0])
    plain, traced, record_s = (times[name][1:] for name in ("untraced", "traced", "record"))
    return {
        "ms": {name: 1000 * stats.median(values[1:]) for name, values in times.items()},
        "record to a pass": stats.median(r / p for r, p in zip(record_s, plain, strict=True)),
        "added by tracing to a pass": stats.median(t / p - 1 for t, p in zip(traced, plain, strict=True)),
        "MB": size / 1e6,
    }


def main() -> None:
    """Parse the command line, measure, print, and write JSON with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default="1b", choices=("thin", *SHAPES))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch's default: the environment's OMP_NUM_THREADS, or the cores")
    parser.add_argument("--fresh", action="store_true", help="a record takes memory when it is asked for")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.fresh:
        Rooms.idles = lambda *_: False  # type: ignore[method-assign]
    model = random_model(THIN if args.shape == "thin" else SHAPES[args.shape], args.tokens, args.device)
    if args.device == "cpu":
        model = model.float()
    ids = torch.randint(0, model.config.vocab_size, (args.prompts, args.tokens), device=args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    about = {"device": f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"}
    print(f"{about['device']} (which copy a record)", flush=True)
    found: dict[str, Any] = {**about, "shape": args.shape, "prompts": args.prompts, "tokens": args.tokens}
    found |= {"fresh": args.fresh or args.device == "cpu", "sets": {}}
    for chosen in args.sets:
        one = found["sets"][chosen] = rounds(model, ids, SETS[chosen], args.rounds, args.device)
        ms = ", ".join(f"{kind} {value:.1f} ms" for kind, value in one["ms"].items())
        ratio = (
            f"record {one['record to a pass']:.2f}x of a pass, tracing adds {one['added by tracing to a pass']:.2f}x"
        )
        print(f"{chosen:<14} {ms}; {ratio}; {one['MB']:.0f} MB", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
