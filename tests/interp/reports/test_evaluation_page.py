"""The section of an evaluation: what changed, escaped and of limited size, doses, and controls of both kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from headscope.interp.reports.evaluation import SHOWN, few
from headscope.interp.reports.results import Results
from headscope.interp.results.evaluation import Evaluation

ATTACK = "</td><script>alert(1)</script>"


def saved(folder: Path, conditions: int, trials: int, moved: bool = True, length: int = 20) -> str:
    """A report of a made-up evaluation whose edits each change every trial."""
    rows, told = [], [{"name": "no edit", "kind": "baseline", "edits": []}]
    for at in range(conditions + 1):
        name, kind = ("no edit", "baseline") if not at else (f"scale (factor={at})", "intervention")
        if at:
            told.append({"name": name, "kind": kind, "edits": [{"name": name, "kind": "Scale", "factor": at}]})
        for trial in range(trials):
            row = {"task": "facts", "condition": name, "kind": kind, "of": "", "control": "", "trial": trial}
            text = {"question": f"{trial} {ATTACK}", "response": f"{name} {ATTACK} " + "long " * length}
            rows.append({**row, **text, "score": float(at * moved) + trial})
            for control in ("random heads", "random vectors") if at else ():
                other = {
                    "condition": f"{control} for {name} (seed 0)",
                    "kind": "control",
                    "of": name,
                    "control": control,
                }
                rows.append({**row, **text, **other, "score": 0.5})
    Evaluation.from_rows(rows, {"facts": "points"}, {"conditions": told}, {"facts": True}).save(folder)
    return Results.find(folder).report(None, None).save(folder / "r.html").read_text()


def test_trials_that_changed_are_shown_and_escaped(tmp_path: Path) -> None:
    page = saved(tmp_path, 3, 8)
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert "Trials that changed" in page and "8 trials scored higher, 0 lower, 0 the same" in page
    assert page.count('<th scope="col">response before</th>') == 3 and "question: 7" not in page  # five of each
    assert "Dose and response" in page and "facts: score against factor" in page
    assert "random vectors" in page and "p permutation" in page and "p holm" in page
    assert "no p can be below" not in page


def test_its_size_is_limited(tmp_path: Path) -> None:
    """40 edits with answers of 100,000 characters: the page is plotly (2 MB) and little more."""
    page = saved(tmp_path, 40, 6, length=20_000)
    assert page.count("those that changed most") >= SHOWN and f"{40 - SHOWN} more conditions changed trials" in page
    assert len(page) < 2_500_000


def test_nothing_changed_and_few_trials_are_said(tmp_path: Path) -> None:
    page = saved(tmp_path, 2, 5, moved=False)
    assert "No intervention changed the score of any trial." in page
    assert "facts, 5 independent trials: with fewer than 6 no p can be below 0.05" in page


@pytest.mark.parametrize(("trials", "said"), [(1, "1 independent trial:"), (5, "5 independent trials:"), (6, None)])
def test_few(trials: int, said: str | None) -> None:
    rows = [
        {"task": "a", "condition": "no edit", "kind": "baseline", "of": "", "trial": i, "score": 1.0}
        for i in range(trials)
    ]
    found = few(Evaluation.from_rows(rows, {"a": ""}, {}).summary())
    assert not found if said is None else said in found[0]
