"""Dates in SmolLM2: how its tokenizer cuts them, from which layer on a probe tells two formats of a day, hop paths.

python probes/benchmarks/dates.py --out probes/benchmarks/results/dates.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.measured import save_measured
from headscope.probes.linear.layers import probe_layers
from headscope.probes.tokens.dates import PERIODS, date_pairs
from headscope.probes.tokens.fragmentation import fragmentation
from headscope.probes.tokens.hops import hop_paths

DAYS = (("03", "12", "2025"), ("17", "05", "1848"), ("30", "11", "2350"))


def fragments(lm: LanguageModel) -> dict[str, float]:
    """The ratio of a bare and a delimited date, the space's marker taken off."""
    tokenizer = lm.required_tokenizer()

    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]

    fields = ("10", "/", "27", "/", "1606")
    found = fragmentation(["10271606", "10/27/1606"], [fields, fields], pieces)
    return {one.date: round(one.ratio, 4) for one in found}


def hops(lm: LanguageModel) -> list[dict[str, Any]]:
    """The best path by each definition, of every day."""
    rows = []
    for day in DAYS:
        prompt = f"is {''.join(day)} a valid date? Answer yes or no:"
        digits = list(dict.fromkeys("".join(day)))[:4]  # the tokenizer has no other pieces
        for definition in ("paper", "code", "lens"):
            best = hop_paths(lm, prompt, digits, ["yes", "no"], definition=definition)[0]
            row = {"prompt": prompt, "definition": definition, "path": best.concepts, "peaks": best.peaks}
            rows.append(row | {"score": round(best.score, 4), "parts": {k: round(x, 4) for k, x in best.parts.items()}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--count", type=int, default=100, help="prompts a period")
    parser.add_argument("--seeds", type=int, default=3, help="splits")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm = load_model(given.model, dtype="float32")
    found: dict[str, Any] = {"fragmentation": fragments(lm), "hops": hops(lm), "probes": {}}
    print(json.dumps(found, indent=1), flush=True)
    asked: list[tuple[str, Any]] = [(period, "resid_post") for period in PERIODS]
    for period, place in [*asked, ("past", "post_attention_norm")]:
        probe = probe_layers(
            lm, date_pairs(period, given.count), place=place, seeds=tuple(range(given.seeds)), progress=False
        )
        table = probe.to_frame()
        found["probes"][f"{period}, {place}"] = row = {
            "tipping point, layer": probe.tipping_point(),
            "accuracy": [round(x, 3) for x in table["accuracy"]],
            "ci_low": [round(x, 3) for x in table["ci_low"]],
            "ci_high": [round(x, 3) for x in table["ci_high"]],
            "control, mean and highest": [round(float(f(table["control"])), 3) for f in (np.mean, np.max)],
            "held out": len(probe.correct),
            "baselines": {name: round(x, 3) for name, x in probe.baselines.items()},
        }
        print(period, place, row, flush=True)
    save_measured(given.out, found, lm, count=given.count, seeds=given.seeds)


if __name__ == "__main__":
    main()
