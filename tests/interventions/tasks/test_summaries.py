"""What a condition's trials say beside their mean."""

from __future__ import annotations

import pandas as pd

from headscope.interventions.evaluation.summaries import summarised


def test_each_condition_is_summarised_from_its_own_trials_and_columns() -> None:
    class Says:
        name = "says"

        def summarise(self, trials: pd.DataFrame) -> dict[str, float]:
            assert "other" not in trials, "a column of another task"
            return {"mean": float(trials["score"].mean()), "rows": float(len(trials))}

    class Silent:
        name = "silent"

    rows = [
        ("says", c, "baseline" if c == "no edit" else "intervention", s, None)
        for c, s in (("no edit", 1.0), ("cut", 0.0), ("cut", 1.0))
    ]
    trials = pd.DataFrame(
        [*rows, ("silent", "no edit", "baseline", 0.0, 5.0)], columns=["task", "condition", "kind", "score", "other"]
    )
    assert summarised([Says(), Silent()], trials) == [  # type: ignore[list-item]
        {"task": "says", "condition": "no edit", "kind": "baseline", "values": {"mean": 1.0, "rows": 1.0}},
        {"task": "says", "condition": "cut", "kind": "intervention", "values": {"mean": 0.5, "rows": 2.0}},
    ]
