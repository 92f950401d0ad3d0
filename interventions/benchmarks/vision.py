"""What edits for pictures do on ``llava-smollm2``: captions (CHAIR), yes/no (POPE) and spatial questions.

    python interventions/benchmarks/vision.py --out interventions/benchmarks/results/vision.json

Every method as its paper has it (what a 7B model's numbers cannot mean here, sink dimensions and the recency trend, is
found in this model), next to matched controls: random heads for those that choose heads, random tokens for those that
choose tokens, and the plain doubling and halving of attention to the image. Differences from no edit are paired by
scene, with intervals and p by permutation. A run that was interrupted goes on from ``--folder``.

    python interventions/benchmarks/vision.py --conditions sgrs --tasks hallucination --samples 8 --controls 0 \\
        --out interventions/benchmarks/results/vision-sgrs.json

SGRS draws its tokens, so the one to compare it with is SGRS that rejects none (``alpha=0``), not the greedy captions of
no edit. It takes a backward pass a candidate and one caption at a time: minutes for each ten captions on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headscope.interp.heads.vision.attention import debiased, image_attention
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.scenes.world import GRID
from headscope.interp.results.evaluation import Evaluation
from headscope.interp.runs.measured import save_measured
from headscope.interventions import evaluate
from headscope.interventions.attention.adapt_span import AdaptSpanLogits
from headscope.interventions.attention.emphasize_span import EmphasizeSpan
from headscope.interventions.attention.image_sinks import ScaleImageSinks
from headscope.interventions.attention.paint import Paint
from headscope.interventions.attention.prune import PruneTokens
from headscope.interventions.attention.recent import BoostRecent
from headscope.interventions.attention.scale_span import ScaleSpanLogits
from headscope.interventions.attention.visual import RedistributeSinks
from headscope.interventions.base import Intervention
from headscope.interventions.decoding.guidance import Guidance
from headscope.interventions.decoding.sgrs import SaliencyRejection
from headscope.interventions.outputs.reinforce import ReinforceHeads
from headscope.interventions.positions.concentric import ConcentricPositions
from headscope.interventions.tasks.hallucination import Hallucination
from headscope.interventions.tasks.pope import Pope
from headscope.interventions.tasks.scenes import SceneTask
from headscope.interventions.tasks.spatial import Spatial

PRUNED, TREND = 2, 32  # the layer from which tokens are pruned; pictures over which the recency trend is fitted


def edits(lm: LanguageModel) -> list[Intervention]:
    """The conditions, the papers' first."""
    trend = debiased(image_attention(lm, samples=TREND, rows="last"), threshold=None)[1]
    sigma = max(0.0, float(trend.loc[trend["layer"] == PRUNED - 1, "sigma"].iloc[0]))
    return [
        ReinforceHeads(),
        ReinforceHeads(factor=1.5),
        RedistributeSinks.found_in(lm, span="image"),
        Paint(),
        Guidance(gamma=1.1),
        Guidance(gamma=2.0),
        EmphasizeSpan(span="image", inside=2.0),
        EmphasizeSpan(span="image", inside=0.5),
        ScaleSpanLogits(span="image", factor=1.5),
        ScaleSpanLogits(span="image", factor=0.5),
        AdaptSpanLogits(),
        BoostRecent(),
        ScaleImageSinks.found_in(lm, span="image"),
        ScaleImageSinks.found_in(lm, span="image", tokens="random"),
        PruneTokens(layer=PRUNED, keep=0.5),
        PruneTokens(layer=PRUNED, keep=0.5, by="debiased", sigma=sigma),
        PruneTokens(layer=PRUNED, keep=0.5, by="random"),
        ConcentricPositions(grid=(GRID, GRID)),
    ]


def rejections(lm: LanguageModel) -> list[Intervention]:
    """SGRS, and the same draws with none rejected."""
    return [SaliencyRejection(alpha=0.0), SaliencyRejection()]


CONDITIONS: dict[str, Callable[[LanguageModel], list[Intervention]]] = {
    "all": edits,
    "paint": lambda lm: [Paint()],
    "sgrs": rejections,
}


def tasks(samples: int, batch: int) -> list[SceneTask]:
    """Captions last: they take longest."""
    return [
        Spatial(samples=5 * samples, batch=batch),
        Pope(samples=2 * samples, batch=batch),
        Hallucination(samples=samples, batch=batch),
    ]


def by_trial(found: Evaluation) -> dict[str, str]:
    """By condition, every trial's score in their order: each is 0 or 1, a digit."""
    scores = found.scores(next(iter(found.metrics)))
    if not scores.isin((0, 1)).all(axis=None):
        raise ValueError("a score that is neither 0 nor 1")
    return {str(name): "".join(str(int(x)) for x in column) for name, column in scores.items()}


def main() -> None:
    """Evaluate and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="of what goes on after an interruption")
    parser.add_argument("--model", default="llava-smollm2")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--controls", type=int, default=1)
    parser.add_argument("--skip", nargs="*", type=int, default=[], help="conditions to leave out, by their place")
    parser.add_argument("--conditions", choices=CONDITIONS, default="all")
    parser.add_argument("--tasks", nargs="+", default=["spatial", "pope", "hallucination"])
    given = parser.parse_args()
    lm = load_model(given.model, dtype=torch.float32)
    asked = CONDITIONS[given.conditions](lm)
    conditions = [edit for place, edit in enumerate(asked) if place not in given.skip]
    tables: list[dict[str, Any]] = []
    for task in tasks(given.samples, given.batch):
        if task.name not in given.tasks:
            continue
        folder = None if given.folder is None else given.folder / task.name
        found = evaluate(lm, task, conditions, controls=given.controls, out=folder, progress=False)
        tables.append({"task": task.name, "summary": found.summary().to_dict("records"), "details": found.details})
        tables[-1]["trials"] = by_trial(found)
        save_measured(given.out, {"tables": tables}, lm, samples=given.samples, controls=given.controls)
        print(task.name, found.summary(), flush=True)


if __name__ == "__main__":
    main()
