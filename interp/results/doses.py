"""Dose and response: conditions of an evaluation that are one edit at several values of one setting."""

from __future__ import annotations

import json
import re
from typing import Any

import pandas as pd

from headscope.interp.results.evaluation import Evaluation

KEPT = ("mean", "ci_low", "ci_high", "delta", "delta_low", "delta_high", "p_permutation", "p_holm", "n")


def doses(result: Evaluation) -> pd.DataFrame:
    """One row a task, edit and value, by rising value; no rows where no edit was run at several values.

    Which conditions belong together is read from their descriptions: edits that are equal but for one number, which all
    of a condition's edits share that have it (as ``--sweep`` sets it).

    Columns: task, edit (its name without the setting), setting, value, condition, the numbers of ``summary``, and
    random (the mean of its random heads, or vectors, at this value; NaN without).
    """
    summary, contrasts = result.summary(), result.contrasts()
    found: list[dict[str, Any]] = []
    names: dict[str, int] = {}
    for (setting, _), held in _alike(result.provenance.get("conditions") or ()).items():
        if len(set(held.values())) < 2:
            continue
        edit = _without(next(iter(held)), setting)
        names[edit] = names.get(edit, 0) + 1
        edit += f" ({names[edit]})" if names[edit] > 1 else ""
        for task in result.metrics:
            rows = summary[(summary["task"] == task) & summary["condition"].isin(list(held))]
            for row in rows.to_dict("records"):
                told = {"task": task, "edit": edit, "setting": setting, "value": held[row["condition"]]}
                random = _random(contrasts, task, row["condition"])
                found.append(told | {key: row[key] for key in ("condition", *KEPT)} | {"random": random})
    columns = ["task", "edit", "setting", "value", "condition", *KEPT, "random"]
    tasks, edits = list(result.metrics), list(dict.fromkeys(row["edit"] for row in found))
    found.sort(key=lambda row: (tasks.index(row["task"]), edits.index(row["edit"]), row["setting"], row["value"]))
    return pd.DataFrame(found, columns=columns)


def _alike(conditions: Any) -> dict[tuple[str, str], dict[str, float]]:
    """Interventions and their value of a setting, by the setting and everything else that they are."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for condition in conditions:
        if condition["kind"] != "intervention":
            continue
        for setting in dict.fromkeys(key for edit in condition["edits"] for key in edit):
            values = {json.dumps(edit[setting]) for edit in condition["edits"] if setting in edit}
            value = json.loads(next(iter(values)))
            if len(values) > 1 or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            rest = [{k: v for k, v in edit.items() if k not in ("name", setting)} for edit in condition["edits"]]
            found.setdefault((setting, json.dumps(rest, sort_keys=True)), {})[condition["name"]] = float(value)
    return found


def _without(name: str, setting: str) -> str:
    """A condition's name without the value of a setting, and without the number that tells equal names apart."""
    bare = re.sub(rf"(, )?\b{re.escape(setting)}=[^,)]+", "", re.sub(r" #\d+$", "", name))
    return bare.replace("(, ", "(").replace(" ()", "")


def _random(contrasts: pd.DataFrame, task: str, condition: str) -> float:
    if contrasts.empty:
        return float("nan")
    own = contrasts[(contrasts["task"] == task) & (contrasts["condition"] == condition)]
    return float(own["random"].iloc[0]) if len(own) else float("nan")
