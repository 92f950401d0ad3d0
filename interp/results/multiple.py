"""p-values of several tests at once."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Family = Literal["tasks", "tasks and conditions"]


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """p-values adjusted for being several (Holm 1979): the family-wise error of rejecting below alpha is alpha.

    NaN is left out and stays.
    """
    adjusted, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    ordered = known[np.argsort(p[known], kind="stable")]
    steps = p[ordered] * np.arange(len(ordered), 0, -1)
    adjusted[ordered] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def with_holm(frame: pd.DataFrame, p: str, by: list[str], after: str) -> pd.DataFrame:
    """``frame`` with a column ``p_holm`` behind the column ``after``: column ``p`` adjusted by Holm's method, rows that
    are alike in ``by`` being one family."""
    if frame.empty:
        return frame
    found = frame.groupby(by, sort=False)[p].transform(lambda one: holm(one.to_numpy(dtype=np.float64)))
    frame.insert(int(frame.columns.get_indexer([after])[0]) + 1, "p_holm", found)
    return frame
