"""Anchored bias of SmolLM2 on multiple choice: value vectors edited, keys swapped, and one edit for every prompt.

    python interventions/benchmarks/anchoring.py --out interventions/benchmarks/results/anchoring.json

``study_anchor`` edits each prompt towards its own right letter. "towards B" is the authors' edit as their data have it,
where B is always right: one neuron, found most often with a positive activation, edited once for all prompts, whose
options stand in every order.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from headscope.interp.models import load_model
from headscope.interp.runs.measured import save_measured
from headscope.interventions import EditValueVectors, MultipleChoice, TextLoss, evaluate
from headscope.interventions.mechanisms.anchoring import study_anchor
from headscope.probes.lenses.anchored import away_from_anchor


def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=18)
    parser.add_argument("--last", type=int, default=8, help="layers of neurons, from the last")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm = load_model(given.model, dtype="float32")
    task = MultipleChoice(questions=given.questions)
    study = study_anchor(lm, task, prompts=given.prompts, last=given.last, progress=False)
    table, each = study.to_frame(), study.trials[study.trials["edit"] == "value vector"]
    print(study.asked, study.anchored, study.heads, table.to_string(), sep="\n", flush=True)
    layers = each.groupby(["layer", each["activation"] > 0])[["right", "change"]].agg(["mean", "size"])
    print(layers.to_string(), flush=True)
    layer, neuron = each[each["activation"] > 0].groupby(["layer", "neuron"]).size().idxmax()
    edit = EditValueVectors(((int(layer), int(neuron)),), add=away_from_anchor(lm, " A", " B"))
    result = evaluate(lm, [task, TextLoss(2, 256)], [edit], progress=False)
    summary = result.summary()
    print(summary.to_string(), json.dumps(result.details, default=str), sep="\n")
    document = {
        "prompts": study.asked,
        "anchored": study.anchored,
        "heads": [[*head, round(gap, 3)] for head, gap in zip(study.heads, study.heads.weights, strict=True)],
        "rows": rounded(table.to_dict("records")),
        "value vectors by layer": rounded(
            each.groupby("layer")[["right", "change"]].mean().reset_index().to_dict("records")
        ),
        "towards B": {
            "neuron": [int(layer), int(neuron)],
            "rows": rounded(summary.drop(columns=["p"], errors="ignore").to_dict("records")),
            "letters": result.details,
        },
    }
    tasks = {task.name: task.parameters(lm)}
    save_measured(given.out, document, lm, tasks=tasks, prompts_at_most=given.prompts, last=given.last)


if __name__ == "__main__":
    main()
