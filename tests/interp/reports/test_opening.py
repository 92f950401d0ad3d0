"""A report says first what was run, on what, what was found, how sure that is, and what changed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd

from headscope.interp.reports import opening
from headscope.interp.results.scores import HeadScores

MADE = {
    "created": "2026-01-02T03:04:05",
    "versions": {"headscope": "0.1.0", "torch": "2.13", "numpy": "2"},
    "model": {"name": "tiny", "revision": "abc", "dtype": "float32", "device": "cpu"},
}


def test_what_was_run_names_each_model_once() -> None:
    later = {**MADE, "created": "2026-02-03T00:00:00"}
    said = opening.what_was_run([MADE, later, {"model": {"name": "other"}}, {}])
    assert said == [
        "tiny, revision abc, float32, cpu; 2026-01-02 to 2026-02-03, headscope 0.1.0, torch 2.13.",
        "other; nothing else is recorded.",
    ]


def test_what_was_found_names_the_best_heads_and_how_sure_it_is() -> None:
    trials = np.zeros((6, 2, 2))
    trials[:, 1, 0], trials[:, 0, 1] = 0.9, np.linspace(0.4, 0.6, 6)
    (said,) = opening.what_was_found([HeadScores("copied_needle", trials)])
    assert said.startswith("Copied needle: L1H0 0.9 [0.9, 0.9], L0H1 0.5 [0.") and "split-half" in said
    (said,) = opening.what_was_found([HeadScores("copied_needle", trials[:1])])
    assert "a single trial" in said and "[" not in said
    assert opening.what_was_found([HeadScores("x", np.full((2, 1, 1), np.nan))]) == []


def test_what_changed_has_the_largest_difference_first() -> None:
    columns = "task condition kind delta delta_low delta_high p_holm".split()
    rows = [("needle", "no edit", "baseline", 0.0, np.nan, np.nan, np.nan)]
    rows += [("needle", f"top {k}", "intervention", -0.1 * k, -0.2 * k, 0.0, 0.04) for k in range(1, 6)]
    rows += [("needle", "random", "control", -9.0, -9.0, -9.0, 0.01)]
    result = SimpleNamespace(summary=lambda: pd.DataFrame(rows, columns=columns), metrics={"needle": "recall"})
    (said,) = opening.what_changed(result)
    assert said.startswith("needle (recall), from no edit: top 5 -0.5 [-1, +0], p 0.04; top 4 -0.4")
    assert said.endswith("and 2 more below.") and "random" not in said
