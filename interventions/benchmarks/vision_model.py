"""What ``llava-smollm2`` sees and hallucinates, unedited: from its picture, from another's, and from words alone.

python interventions/benchmarks/vision_model.py --out interventions/benchmarks/results/vision_model.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from headscope.interp.models import load_model
from headscope.interp.runs.measured import save_measured
from headscope.interventions import evaluate
from headscope.interventions.tasks.hallucination import Hallucination
from headscope.interventions.tasks.pope import Pope
from headscope.interventions.tasks.scenes import SceneTask
from headscope.interventions.tasks.spatial import Spatial


def settings(samples: int, batch: int) -> dict[str, SceneTask]:
    """What is asked, by name."""
    own: dict[str, Any] = {"samples": samples, "batch": batch}
    asked: dict[str, Any] = {"samples": 5 * samples, "batch": batch}
    found: dict[str, SceneTask] = {
        "captions, companion absent": Hallucination(**own),
        "captions in a list": Hallucination(**own, detail=False),
        "captions, companion there": Hallucination(**own, kinds=("together",)),
        "captions of any scene": Hallucination(**own, kinds=("balanced",)),
        "captions in fog, object in the question": Hallucination(**own, kinds=("fog",), mention=True),
        "captions, another's picture": Hallucination(**own, image="other"),
        "captions, no picture": Hallucination(**own, image="blank"),
    }
    for image in ("own", "other", "blank"):
        found[f"yes or no, picture: {image}"] = Pope(samples=2 * samples, batch=batch, image=image)
        found[f"where, picture: {image}"] = Spatial(**asked, image=image)
    return found


def main() -> None:
    """Measure and write, setting by setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--batch", type=int, default=25)
    given = parser.parse_args()
    lm = load_model("llava-smollm2", dtype=torch.float32)
    rows: list[dict[str, Any]] = []
    for name, task in settings(given.samples, given.batch).items():
        found = evaluate(lm, task, progress=False)
        first = found.summary().iloc[0]
        values = found.details[0]["values"]
        row = {"asked": name, "task": task.name, "metric": task.metric}
        row |= {key: first[key] for key in ("mean", "ci_low", "ci_high", "n")} | values
        rows.append(row)
        print(json.dumps(row, default=float), flush=True)
        save_measured(given.out, {"rows": rows}, lm, samples=given.samples)


if __name__ == "__main__":
    main()
