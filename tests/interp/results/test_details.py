"""What tasks say beside their means, as tables."""

from __future__ import annotations

from typing import Any

import pandas as pd

from headscope.interp.results.details import tables


def test_random_heads_share_a_column() -> None:
    def one(condition: str, kind: str, **values: float) -> dict[str, Any]:
        return {"task": "t", "condition": condition, "kind": kind, "values": values}

    found = tables(
        [
            one("no edit", "baseline", a=1.0, b=2.0),
            one("cut", "intervention", a=0.0),
            one("random for cut (seed 0)", "control", a=0.25, b=1.0),
            one("random for cut (seed 1)", "control", a=0.75, b=3.0),
        ]
    )
    assert list(found) == ["t"] and list(found["t"].columns) == ["value", "no edit", "cut", "random for cut"]
    rows = found["t"].set_index("value")
    assert rows.loc["a"].tolist() == [1.0, 0.0, 0.5]
    assert rows.loc["b", "no edit"] == 2.0 and pd.isna(rows.loc["b", "cut"]) and rows.loc["b", "random for cut"] == 2.0
    assert tables([]) == {}
