"""A picture of every head method on a small model, for its page of the catalogue: layers across, heads down.

    python -m headscope.interp.reports.catalogue_pictures docs/catalogue --model smollm2-135m
    headscope list --write docs/catalogue

draws those that are not there yet (``--again NAME,NAME``: these anew), each from a few trials: they show what a map of
the method looks like, and are no measurement; ``headscope discover NAME`` at its default size is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headscope.interp.heads import METHODS, method
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import settings
from headscope.interp.results.picture import svg_map
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.files import write_atomically

KEPT = "pictures.json"  # in the catalogue: what every picture shows, by the method's name
INK = "#6b7682"  # of its words: readable on a light page and on a dark one
FEW: Mapping[str, Any] = {"samples": 4, "lengths": [400], "depths": [0, 50, 100]}  # where a method has the setting
SKIPPED: Mapping[str, str] = {
    "vhd": "it reads pictures, and this model reads none",
    "visual_sinks": "it reads pictures, and this model reads none",
    "object_region": "it reads pictures, and this model reads none",
    "head_gating": "it trains gates for minutes before there is a number",
    "contrastive_gating": "it trains gates for minutes before there is a number",
}


def pictures(catalogue: Path) -> dict[str, str]:
    """What every picture of a catalogue shows, by the method's name; empty where none was drawn."""
    kept = catalogue / KEPT
    return dict(json.loads(kept.read_text(encoding="utf-8"))) if kept.exists() else {}


def section(group: str, name: str, shown: Mapping[str, str]) -> list[str]:
    """The paragraphs of an entry's page that show its picture, or say why there is none; none for other registries."""
    if group != "methods" or not shown:
        return []
    if name in shown:
        return [f"![Every head of a small model by {name}](pictures/{name}.svg)", shown[name]]
    return [f"No picture: {SKIPPED[name]}."] if name in SKIPPED else []


def draw(catalogue: Path, lm: LanguageModel, name: str) -> str:
    """Score the heads of ``lm`` by few trials, write ``methods/pictures/NAME.svg``, and return what it shows."""
    few = {key: value for key, value in FEW.items() if key in settings(METHODS[name])}
    scores = method(name)(lm, progress=False, **few)
    told = words(scores, lm.name, few, per=METHODS[name].per)
    values = scores.mean if METHODS[name].per == "head" else scores.mean[:, :1]
    svg = svg_map(values, f"{name} ({METHODS[name].unit})", hover=False, ink=INK)
    write_atomically(catalogue / "methods/pictures" / f"{name}.svg", svg.encode())
    return told


def words(scores: HeadScores, model: str, few: Mapping[str, Any], *, per: str) -> str:
    """The picture's caption: of what, from how much, and the highest score with its interval."""
    best = scores.to_frame().dropna(subset="score").iloc[0]
    place = f"L{int(best['layer'])}H{int(best['head'])}" if per == "head" else f"layer {int(best['layer'])}"
    ends = float(best["ci_low"]), float(best["ci_high"])
    between = f" [{ends[0]:.3g}, {ends[1]:.3g}]" if np.isfinite(ends).all() else ""
    given = ", ".join(f"`{key}={value}`" for key, value in few.items()) or "its default size"
    count = len(scores.trials)
    trials = f"{count} trial{'s' if count > 1 else ''}"
    return f"{model}, float32 on a CPU, {trials} ({given}); highest: {place}, {float(best['score']):.3g}{between}."


def main() -> None:
    """Draw what is missing or asked for, and keep what each shows as soon as it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("catalogue", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--again", default="", help="methods to draw anew, comma-separated")
    asked = parser.parse_args()
    shown, again = pictures(asked.catalogue), asked.again.split(",")
    wanted = [name for name in METHODS if name not in SKIPPED and (name not in shown or name in again)]
    lm = load_model(asked.model, device="cpu", dtype="float32")
    for name in wanted:
        shown[name] = draw(asked.catalogue, lm, name)
        kept = {one: shown[one] for one in METHODS if one in shown}
        write_atomically(asked.catalogue / KEPT, (json.dumps(kept, indent=1) + "\n").encode())
        print(f"{name}: {shown[name]}", flush=True)


if __name__ == "__main__":
    main()
