"""Factual recall of SmolLM2 after Lv et al.: who writes the country, what the last layer writes against the capital.

    python interventions/benchmarks/recall.py --out interventions/benchmarks/results/recall.json

Prompts are "[lead-in] the capital of [country] is". Parts that write against the answer are found on every other
country and scaled on the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from headscope.interp.models import load_model
from headscope.interp.runs.measured import save_measured
from headscope.interventions.mechanisms.suppression import study_suppression
from headscope.probes.attribution.mlp_decomposition import mlp_decomposition
from headscope.probes.lenses.recall import LEADS, capitals, topic_ranks


def records(frame: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = frame.to_dict("records")
    return [{key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--leads", type=int, default=3, help="lead-ins, of six")
    parser.add_argument("--controls", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm = load_model(given.model, dtype="float32")
    facts = capitals(lm, LEADS[: given.leads])
    found: dict[str, Any] = {"prompts": len(facts.prompts), "countries": len(set(facts.groups))}
    for factor in (0.0, 0.5):
        study = study_suppression(lm, facts, factor=factor, controls=given.controls, progress=False)
        found[f"scaled by {factor}"] = records(study.to_frame())
        print(study.to_frame().to_string(), flush=True)
    found["last layer"] = records(study.shares.to_frame(study.groups_found))
    print(study.shares.to_frame(study.groups_found).to_string(), flush=True)
    one_lead = [i for i, template in enumerate(facts.templates) if template == 0]
    ranks = topic_ranks(lm, [facts.prompts[i] for i in one_lead], [facts.topics[i] for i in one_lead])
    median = np.median(ranks.trials, 0)
    order = np.argsort(median, axis=None, kind="stable")[:8]
    found["median rank of the country, best heads"] = [
        [int(at // median.shape[1]), int(at % median.shape[1]), float(median.ravel()[at])] for at in order
    ]
    for layer in (lm.info.layers - 1, int(order[0] // median.shape[1])):
        fit = mlp_decomposition(lm, facts.prompts, layer, [str(template) for template in facts.templates])
        found[f"MLP of layer {layer}"] = {"r2": round(fit.r2, 4), "rows": records(fit.to_frame())}
        print(layer, fit.r2, fit.to_frame().to_string(), flush=True)
    print(found["median rank of the country, best heads"])
    save_measured(given.out, found, lm, leads=given.leads, controls=given.controls)


if __name__ == "__main__":
    main()
