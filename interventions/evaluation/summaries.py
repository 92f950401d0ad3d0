"""What tasks say of a condition beside its mean score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from headscope.interventions.tasks.base import Task


def summarised(tasks: Sequence[Task], trials: pd.DataFrame) -> list[dict[str, Any]]:
    """One dict a task and condition: task, condition, kind, and values by name, of the tasks that summarise."""
    found = []
    for task in tasks:
        summarise = getattr(task, "summarise", None)
        if summarise is None:
            continue
        for condition, own in trials[trials["task"] == task.name].groupby("condition", sort=False):
            values = summarise(own.dropna(axis="columns", how="all").reset_index(drop=True))
            if values:
                kind = str(own["kind"].iloc[0])
                found.append({"task": task.name, "condition": condition, "kind": kind, "values": values})
    return found
