"""What ten head methods that read statistics of the same texts cost together, against one of them, on SmolLM2-135M.

Run: python interp/benchmarks/shared_passes.py [--out FILE]

Methods share forward passes over samples of the same tokens, so that all are given one length: their own defaults are
their papers' (64 tokens for the sinks, 256 for spans and anchors, 512 for entropy), and methods of different lengths
share nothing. On the command line, `--set length=256 --samples 4` does the same. In every round each method runs alone
and all run together, in the other order every second round; a first round warms up and is dropped. Ratios are taken
within rounds, of processor time (which a busy machine disturbs less) and of wall time; "one" is the median of the ten
alone, and the cheapest of them is reported beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics as stats
import time
from pathlib import Path
from typing import Any

import torch

from headscope.interp import heads, load_model
from headscope.interp.heads.base import HeadMethod
from headscope.interp.heads.discovery import discover
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import make

MODEL = "smollm2-135m"
TEN = (
    "sinks",
    "hidden_sinks",
    "sink_key_norm",
    "sink_value_norm",
    "sink_hidden_norm",
    "attention_entropy",
    "effective_context",
    "head_span",
    "waad",
    "fai",
)
TOGETHER = "together"
Seconds = dict[str, float]


def methods(names: tuple[str, ...], length: int, samples: int) -> list[HeadMethod]:
    """Methods on the same texts, all in one batch."""
    given = {"length": length, "samples": samples, "batch": samples}
    return [make(heads.METHODS[name], name, given) for name in names]


def rounds(lm: LanguageModel, chosen: list[HeadMethod], count: int) -> list[dict[str, Seconds]]:
    """Processor and wall seconds of every method alone, and of all together, in every round."""
    runs = {method.name: [method] for method in chosen} | {TOGETHER: chosen}
    found = []
    for number in range(count + 1):
        order = list(runs)[:: 1 if number % 2 else -1]
        taken = {name: _seconds(lm, runs[name]) for name in order}
        found.append(taken)
    return found[1:]


def _seconds(lm: LanguageModel, chosen: list[HeadMethod]) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    discover(chosen, lm, progress=False)
    return {"processor": time.process_time() - processor, "wall": time.perf_counter() - wall}


def summary(found: list[dict[str, Seconds]]) -> dict[str, Any]:
    """Medians over rounds: seconds of every run, and what all together cost against one, the cheapest and the sum."""
    result: dict[str, Any] = {}
    for clock in ("processor", "wall"):
        each = [{name: taken[clock] for name, taken in one.items()} for one in found]
        alone = [[seconds for name, seconds in one.items() if name != TOGETHER] for one in each]
        ratios = {
            "one": [one[TOGETHER] / stats.median(others) for one, others in zip(each, alone, strict=True)],
            "the cheapest": [one[TOGETHER] / min(others) for one, others in zip(each, alone, strict=True)],
            "all alone": [one[TOGETHER] / sum(others) for one, others in zip(each, alone, strict=True)],
        }
        result[clock] = {
            "seconds": {name: round(stats.median(one[name] for one in each), 2) for name in each[0]},
            "together over": {name: round(stats.median(values), 2) for name, values in ratios.items()},
            "over one, by round": [round(value, 2) for value in ratios["one"]],
        }
    return result


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    lm, load = load_model(MODEL), os.getloadavg()[0]
    found = summary(rounds(lm, methods(TEN, asked.length, asked.samples), asked.rounds))
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    settings = {"length": asked.length, "samples": asked.samples, "rounds": asked.rounds}
    load_average = {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)}
    document = {"model": MODEL, **settings, "machine": machine, "load_average": load_average, **found}
    text = json.dumps(document, indent=1)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
