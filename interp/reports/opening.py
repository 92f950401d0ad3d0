"""How a report begins: what was run, on what, what was found, how sure that is, and what changed, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from headscope.interp.analysis.reliability import split_half
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.evaluation import Evaluation
from headscope.interp.results.scores import HeadScores

FEW_WORDS = 3  # heads, conditions: a sentence names no more


def what_was_run(provenances: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence a model: its name, revision, precision and device, versions and days; of results that say so."""
    seen: dict[str, list[Mapping[str, Any]]] = {}
    for made in provenances:
        about = made.get("model")
        if isinstance(about, Mapping) and about.get("name"):
            seen.setdefault(_model(about), []).append(made)
    return [f"{model}; {_when(made)}." for model, made in seen.items()]


def _model(about: Mapping[str, Any]) -> str:
    revision = str(about.get("revision") or "")[:12]
    where = [str(about[name]) for name in ("dtype", "device") if about.get(name)]
    return ", ".join([str(about["name"]), *([f"revision {revision}"] if revision else []), *where])


def _when(made: list[Mapping[str, Any]]) -> str:
    days = sorted({str(one.get("created", ""))[:10] for one in made} - {""})
    versions = {name: v for one in made for name, v in dict(one.get("versions") or {}).items()}
    shown = [f"{name} {versions[name]}" for name in ("headscope", "torch", "transformers") if name in versions]
    span = days[:1] if len(days) < 2 else [f"{days[0]} to {days[-1]}"]
    return ", ".join([*span, *shown]) or "nothing else is recorded"


def what_was_found(scores: Iterable[HeadScores]) -> list[str]:
    """A sentence a method: its best heads, over how many trials, and whether half of them give the same heads."""
    found = []
    for one in scores:
        frame = one.to_frame().dropna(subset="score").head(FEW_WORDS)
        if frame.empty:
            continue
        best = [_scored(row) for row in frame.to_dict("records")]
        try:
            sure = split_half(one).words()
        except HeadscopeError:  # a single trial has no halves
            sure = "a single trial, so nothing is known of how far another would agree"
        found.append(f"{one.method.replace('_', ' ').capitalize()}: {', '.join(best)}; {sure}.")
    return found


def _scored(row: Mapping[Any, Any]) -> str:
    low, high = float(row["ci_low"]), float(row["ci_high"])
    between = f" [{low:.2g}, {high:.2g}]" if np.isfinite([low, high]).all() else ""
    return f"L{int(row['layer'])}H{int(row['head'])} {float(row['score']):.2g}{between}"


def what_changed(result: Evaluation) -> list[str]:
    """A sentence a task: the conditions whose difference from no edit is largest, with intervals and adjusted p."""
    found = []
    summary = result.summary()
    rows = summary[(summary["kind"] == "intervention") & summary["delta"].notna()]
    for task, part in rows.groupby("task", sort=False):
        largest = part.reindex(part["delta"].abs().sort_values(ascending=False, kind="stable").index)
        told = [_change(row) for row in largest.head(FEW_WORDS).to_dict("records")]
        more = f", and {len(part) - FEW_WORDS} more below" if len(part) > FEW_WORDS else ""
        found.append(f"{task} ({result.metrics.get(str(task), 'score')}), from no edit: {'; '.join(told)}{more}.")
    return found


def _change(row: Mapping[Any, Any]) -> str:
    low, high = float(row["delta_low"]), float(row["delta_high"])
    between = f" [{low:+.2g}, {high:+.2g}]" if np.isfinite([low, high]).all() else ""
    p = row.get("p_holm", row.get("p"))
    sure = "" if p is None or pd.isna(p) else f", p {float(p):.2g}"
    return f"{row['condition']} {float(row['delta']):+.2g}{between}{sure}"
