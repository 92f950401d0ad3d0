"""Which trials of an evaluation an edit changed, and what was said before and after."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from headscope.interp.results.evaluation import COLUMNS, Evaluation

OWN = {*COLUMNS, "control", "group", "note"}  # of a table of trials: not what a task says of one
LONG = 240  # characters of a text that are shown
SAME = 1e-9  # scores that are as near as this are equal


@dataclass(frozen=True)
class Changed:
    """What a condition changed of a task: how many trials scored ``higher``, ``lower`` and the ``same`` as without an
    edit, and the table of those that changed ``most``: trial, what it is, scores (before, after, change) and, of every
    text that differs between conditions, the text before and after."""

    task: str
    condition: str
    higher: int
    lower: int
    same: int
    most: pd.DataFrame


def changed(result: Evaluation, task: str, condition: str, count: int = 5) -> Changed:
    """The ``count`` trials of a task whose score a condition changed most, the largest change first.

    What a task says of a trial is what it is where all conditions say the same (a question, a length), and what came
    of it where they differ (an answer); numbers that differ are left out.
    """
    part = result.trials[result.trials["task"] == task]
    first = part["condition"].iloc[0]
    before, after = (part[part["condition"] == one].set_index("trial") for one in (first, condition))
    delta = (after["score"] - before["score"]).astype(np.float64)
    moved = delta[delta.abs() > SAME]
    chosen = moved.loc[moved.abs().sort_values(ascending=False, kind="stable").index[:count]].index
    fixed, said = _columns(part)
    table = pd.DataFrame({"trial": chosen, "what": [_told(before.loc[one, fixed]) for one in chosen]})
    for name in said:
        for when, rows in (("before", before), ("after", after)):
            table[f"{name} {when}"] = [clipped(rows.loc[one, name]) for one in chosen]
    scores = {"before": before.loc[chosen, "score"], "after": after.loc[chosen, "score"], "change": delta.loc[chosen]}
    table = table.assign(**{f"score {name}": one.to_numpy() for name, one in scores.items()})
    higher, lower = int((delta > SAME).sum()), int((delta < -SAME).sum())
    return Changed(task, condition, higher, lower, len(delta) - higher - lower, table)


def clipped(text: object) -> str:
    """A text on one line, its middle left out where it is long."""
    words = "" if text is None or (isinstance(text, float) and np.isnan(text)) else " ".join(str(text).split())
    half = LONG // 2
    return words if len(words) <= LONG else f"{words[:half].rstrip()} … {words[-half:].lstrip()}"


def _columns(part: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Columns that are the same in every condition of a trial, and texts that are not."""
    fixed, said = [], []
    for name in [str(name) for name in part if name not in OWN]:
        kinds = {type(value) for value in part[name].dropna()}
        if not kinds or any(issubclass(kind, list | dict | np.ndarray) for kind in kinds):
            continue
        if (part.groupby("trial", sort=False)[name].nunique(dropna=False) == 1).all():
            fixed.append(name)
        elif str in kinds:
            said.append(name)
    return fixed, said


def _told(row: pd.Series) -> str:
    """What a trial is: ``needle: train; length: 600; depth: 50``."""
    return "; ".join(
        f"{str(name).replace('_', ' ')}: {clipped(value)}" for name, value in row.items() if pd.notna(value)
    )
