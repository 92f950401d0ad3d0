"""Tables for people."""

from __future__ import annotations

import numpy as np
import pandas as pd

INTERVALS = (
    ("ci_low", "ci_high", "interval"),
    ("low", "high", "interval"),
    ("ci_low_recall", "ci_high_recall", "interval of recall"),
    ("delta_low", "delta_high", "interval of the difference"),
    ("null_low", "null_high", "95 % of the null"),
)


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """A table for people: an interval is one column, methods are words."""
    frame = frame.copy()
    for low, high, name in INTERVALS:
        if {low, high} <= set(frame.columns):
            shown = [
                "–" if np.isnan([a, b]).any() else f"{a:.3g} to {b:.3g}"
                for a, b in zip(frame[low], frame[high], strict=True)
            ]
            frame.insert(int(frame.columns.get_indexer([low])[0]), name, shown)
            frame = frame.drop(columns=[low, high])
    for name in {"p", "p_permutation", "p_holm"} & set(frame.columns):
        frame[name] = ["–" if pd.isna(p) else f"{p:.2g}" for p in frame[name]]
    if "method" in frame:
        frame["method"] = [str(method).replace("_", " ") for method in frame["method"]]
    return frame
