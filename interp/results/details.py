"""What tasks say of a condition beside its mean score, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd


def tables(details: Sequence[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """For every task that says something, one row a name and one column a condition.

    Random heads of one intervention share a column, the mean over their sets.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for one in details:
        condition = str(one["condition"]).partition(" (seed ")[0] if one["kind"] == "control" else one["condition"]
        for name, value in one["values"].items():
            found.setdefault(one["task"], {}).setdefault(name, {}).setdefault(condition, []).append(value)
    return {
        task: pd.DataFrame(
            [{"value": name, **{c: sum(v) / len(v) for c, v in by.items()}} for name, by in names.items()]
        )
        for task, names in found.items()
    }
