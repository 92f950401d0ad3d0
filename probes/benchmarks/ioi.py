"""An IOI circuit: attribution beside true patching of every head, faithfulness beside random circuits, shared heads.

Run: python probes/benchmarks/ioi.py --out probes/benchmarks/results/ioi.json (on a CPU: --small)
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headscope.interp import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.measured import save_measured
from headscope.probes.circuits.circuit import compare_circuits
from headscope.probes.circuits.coloured import coloured_objects
from headscope.probes.circuits.evaluation import evaluate_circuit, faithfulness_curve, top_circuit
from headscope.probes.circuits.finding import find_circuit
from headscope.probes.circuits.ioi import ioi
from headscope.probes.patching.activation import patch_heads
from headscope.probes.patching.attribution import attribution_patching, correlation, sampled
from headscope.probes.patching.pairs import Pairs

SIZES = (1, 2, 3, 5, 10, 20, 40, 80, 160)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and its seconds."""
    begin = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, round(time.perf_counter() - begin, 2)


def estimates(lm: LanguageModel, pairs: Pairs, heads: int, passes: dict[str, Any]) -> dict[str, Any]:
    """Attribution of z, plain and integrated, and of q with the QK fix, each beside true patching."""
    size = {"batch_size": passes["batch_size"]}
    chosen = sampled(attribution_patching(lm, pairs, progress=False, **size).scores, heads, 0)
    settings: dict[str, Any] = {"heads": chosen, "direction": "noise", "progress": False, **passes}
    found: dict[str, Any] = {}
    true = {}
    for component in ("z", "q"):
        true[component], seconds = timed(partial(patch_heads, lm, pairs, component, **settings))
        found[f"patching_{component}"] = {"heads": len(chosen), "forwards": 2 + len(chosen), "seconds": seconds}
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "z": ("z", {}),
        "z, 5 steps": ("z", {"steps": 5}),
        "q": ("q", {}),
        "q, QK fix": ("q", {"fix": "qk"}),
    }
    for name, (component, more) in asked.items():
        one, seconds = timed(partial(attribution_patching, lm, pairs, component, progress=False, **more, **size))
        found[name] = {
            "forwards": one.forwards,
            "backwards": one.backwards,
            "seconds": seconds,
            **correlation(one.scores, true[component]),
        }
    return found


def measure(lm: LanguageModel, small: bool) -> dict[str, Any]:
    """All numbers."""
    count, randoms, size = (8, 2, 5) if small else (64, 20, 20)
    passes: dict[str, Any] = {"batch_size": 8, "together": 4} if small else {"batch_size": 64, "together": 16}
    pairs, others = ioi(lm, count), ioi(lm, count, seed=1)
    found: dict[str, Any] = {"pairs": count}
    found["estimates"] = estimates(lm, pairs, 12 if small else lm.info.layers * lm.info.heads, passes)
    circuits = {"attribution": find_circuit(lm, pairs, size, progress=False, **passes)}
    if not small:
        few = pairs.part(slice(0, 16))
        circuits["path"], seconds = timed(
            lambda: find_circuit(lm, few, size, "path", budget=6000, progress=False, **passes)
        )
        found["path search"] = {"seconds": seconds, **{k: circuits["path"].provenance[k] for k in ("passes", "ended")}}
        found["attribution beside path"] = compare_circuits(circuits["attribution"], circuits["path"])
    for name, one in circuits.items():
        held = evaluate_circuit(
            lm, one, others, randoms=randoms, subsets=4, minimality=not small, progress=False, **passes
        )
        found[name] = {"heads": [f"L{a}H{b}" for a, b in one.heads], "edges": len(one.edges), **held.document()}
    scores = attribution_patching(lm, pairs, progress=False, batch_size=passes["batch_size"]).scores
    sizes = SIZES[:4] if small else SIZES
    curve = faithfulness_curve(lm, scores, others, sizes, randoms=randoms // 2, progress=False, **passes)
    found["curve"] = curve.to_dict("records")
    if not small:
        colours = coloured_objects(lm, count)
        there = attribution_patching(lm, colours, progress=False, batch_size=16).scores
        found["ioi beside coloured objects"] = compare_circuits(circuits["attribution"], top_circuit(there, size))
    return found


def main() -> None:
    """Measure, print as JSON, and write it with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--small", action="store_true", help="few pairs and heads, for a CPU")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    lm = load_model(asked.model, dtype="float32")
    found, seconds = timed(lambda: measure(lm, asked.small))
    print(json.dumps(found, indent=1))
    save_measured(asked.out, {"seconds": seconds, **found}, lm, small=asked.small)


if __name__ == "__main__":
    main()
