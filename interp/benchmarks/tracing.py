"""What tracing costs and how exact it is, on SmolLM2-135M and this machine.

    OMP_NUM_THREADS=1 python interp/benchmarks/tracing.py --out interp/benchmarks/results.json

1. Agreement, on prose: every statistic against the eager attention weights of an untouched copy of the model, float32;
   generated tokens with and without tracing.
2. Time: traced forward passes against untraced SDPA and eager ``output_attentions``, alternating in one process;
   medians and their ratios, of processor time (of all threads; on one thread the work itself, whoever else is on the
   machine; several threads also burn it while they wait for each other) and of the clock on the wall. The
   language-model head runs on the last position only.
3. Memory: peak resident size of a fresh process over its size with the model loaded, traced and untraced. glibc's
   heap keeps freed blocks below later ones, which moves the peak by hundreds of MiB from run to run; the allocator is
   therefore told to give every block above 64 KiB back at once (MALLOC_MMAP_THRESHOLD_), and both are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics as stats
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headscope.interp import load_model, trace
from headscope.interp.prompts import load_haystack
from headscope.interp.statistics import BlockMap, Distance, Entropy, KeyMass, LogSumExp, SinkMass, Statistic

MODEL = "smollm2-135m"
EAGER = "eager with weights"
ROWS: tuple[Statistic, ...] = (LogSumExp(), Entropy(), SinkMass(4), Distance())
SETS: dict[str, tuple[Statistic, ...]] = {
    "rows": ROWS,
    "rows and key mass": (*ROWS, KeyMass()),
    "rows and a map of blocks": (*ROWS, BlockMap(64)),
}


def prompt(length: int) -> Tensor:
    """Random token ids (1, length), the same every time."""
    return torch.randint(0, 49152, (1, length), generator=torch.Generator().manual_seed(0))


def agreement(length: int) -> dict[str, float]:
    """Largest difference from eager weights over all layers, heads and queries; distance and key mass relative."""
    lm, eager = load_model(MODEL), load_model(MODEL)
    eager.model.set_attn_implementation("eager")
    ids = torch.tensor([lm.tokenizer(load_haystack(None)[: 8 * length])["input_ids"][:length]])
    with torch.no_grad():
        weights = torch.stack(eager.model(input_ids=ids, output_attentions=True).attentions, dim=1)  # (1, l, h, q, k)
    with trace(lm, SETS["rows and key mass"]) as tracer:
        lm.model(input_ids=ids)
    record = {name: torch.from_numpy(tracer.record[name].to_numpy()) for name in tracer.record}
    at = torch.arange(length)
    truth = {
        "entropy": torch.special.entr(weights).sum(-1),
        "sink_mass": weights[..., :4].sum(-1),
        "distance": (weights * (at[:, None] - at[None, :])).sum(-1),
        "key_mass": weights.sum(-2),
    }
    worst = {name: float((record[name] - value).abs().max()) for name, value in truth.items()}
    for name in ("distance", "key_mass"):
        worst[f"{name} (relative to its largest value)"] = worst.pop(name) / float(truth[name].max())
    plain = lm.model.generate(ids[:, :128], max_new_tokens=32, do_sample=False)
    with trace(lm, SETS["rows and key mass"]):
        traced = lm.model.generate(ids[:, :128], max_new_tokens=32, do_sample=False)
    worst["generated tokens that differ, of 32"] = float((plain != traced).sum())
    return worst


@dataclass(frozen=True)
class Took:
    """Seconds of one pass: of the processor, summed over threads, and of the clock on the wall."""

    processor: float
    wall: float


def timing(length: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Of each clock: median seconds of a forward pass each way, measured in turn, and their ratios."""
    lm = load_model(MODEL)
    ids = prompt(length)
    kinds: dict[str, Callable[[], Any]] = {
        "untraced": nullcontext,
        **{name: partial(trace, lm, chosen) for name, chosen in SETS.items()},
    }
    taken: dict[str, list[Took]] = {name: [] for name in [*kinds, EAGER]}
    for round_number in range(repeats + 1):
        for name, context in kinds.items():
            taken[name].append(_once(lm, ids, context))
        if round_number < 2:  # slow, and its ratio is far from its bound
            lm.model.set_attn_implementation("eager")
            taken[EAGER].append(_once(lm, ids, nullcontext, output_attentions=True))
            lm.model.set_attn_implementation("sdpa")
    found: dict[str, dict[str, Any]] = {}
    for clock in ("processor", "wall"):
        seconds = {name: stats.median(getattr(one, clock) for one in those[1:]) for name, those in taken.items()}
        found[f"{clock} time"] = {
            f"seconds at {length} tokens": seconds,
            "ratio to untraced": {name: value / seconds["untraced"] for name, value in seconds.items()},
            "ratio to eager with weights": {name: seconds[name] / seconds[EAGER] for name in SETS},
        }
    return found


def _once(lm: Any, ids: Tensor, context: Callable[[], Any], **kwargs: Any) -> Took:
    with torch.no_grad(), context():
        begin = time.process_time(), time.perf_counter()
        lm.model(input_ids=ids, logits_to_keep=1, use_cache=False, **kwargs)
        return Took(time.process_time() - begin[0], time.perf_counter() - begin[1])


def memory(length: int, runs: int = 2) -> dict[str, dict[str, float]]:
    """MiB a forward pass adds to the resident size of a fresh process, by kind of pass; largest of several runs."""
    settings = {"blocks given back at once": {"MALLOC_MMAP_THRESHOLD_": "65536"}, "glibc's default heap": {}}
    return {
        title: {name: max(_memory_of(name, length, extra) for _ in range(runs)) for name in ["untraced", *SETS]}
        for title, extra in settings.items()
    }


def _memory_of(name: str, length: int, extra: dict[str, str]) -> float:
    command = [sys.executable, __file__, "--peak-of", name, "--memory-length", str(length)]
    environment = {**os.environ, **extra}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.split()[-1])


def _peak(name: str, length: int) -> float:
    lm = load_model(MODEL)
    ids = prompt(length)
    context: Callable[[], Any] = partial(trace, lm, SETS[name]) if name in SETS else nullcontext
    _once(lm, ids[:, :64], context)
    before = _resident()
    _once(lm, ids, context)
    return _high_water() - before


def _resident() -> float:
    # the loader's own peak would hide a smaller forward pass: reset the high-water mark where the kernel lets us
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def _high_water() -> float:
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    """Measure, print one table, and write it as JSON with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--agreement-length", type=int, default=512)
    parser.add_argument("--memory-length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peak_of:
        print(_peak(chosen.peak_of, chosen.memory_length))
        return
    times = timing(chosen.length, chosen.repeats)
    peaks = memory(chosen.memory_length)
    result = {
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "agreement": agreement(chosen.agreement_length),
        **times,
        f"MiB added at {chosen.memory_length} tokens": peaks,
        "MiB above untraced": {
            title: {name: found[name] - found["untraced"] for name in SETS} for title, found in peaks.items()
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
