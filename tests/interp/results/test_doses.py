"""Which conditions are one edit at several doses, and which trials an edit changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from headscope.interp import plots
from headscope.interp.errors import HeadscopeError
from headscope.interp.results.changed import LONG, changed, clipped
from headscope.interp.results.doses import doses
from headscope.interp.results.evaluation import Evaluation


def evaluation(
    conditions: dict[str, list[dict[str, Any]]], scores: dict[str, list[float]], **columns: Any
) -> Evaluation:
    """Made-up scores of two tasks under conditions with these descriptions; a column is a function of both."""
    told = [{"name": name, "kind": "intervention", "edits": edits} for name, edits in conditions.items()]
    rows = [
        {"task": task, "condition": name, "kind": "intervention" if name in conditions else "baseline", "of": ""}
        | {"trial": trial, "score": score, **{key: make(name, trial) for key, make in columns.items()}}
        for task in ("b", "a")
        for name, values in scores.items()
        for trial, score in enumerate(values)
    ]
    rows += [
        {
            **row,
            "condition": f"random for {name}",
            "kind": "control",
            "of": name,
            "control": "random heads",
            "score": 0.5,
        }
        for row in rows
        for name in list(conditions)[:1]
        if row["condition"] == name
    ]
    made = {"conditions": [{"name": "no edit", "kind": "baseline", "edits": []}, *told]}
    return Evaluation.from_rows(rows, {"b": "points", "a": "points"}, made)


def edit(kind: str, strength: float, **more: Any) -> dict[str, Any]:
    return {
        "name": f"{kind} ({strength})",
        "kind": kind,
        "heads": [[0, 1]],
        "strength": strength,
        "during": "always",
    } | more


def test_edits_that_differ_in_one_number_are_doses() -> None:
    conditions = {
        "scale (strength=0.5, x=2)": [edit("scale", 0.5, x=2)],
        "scale (x=2)": [edit("scale", 1.0, x=2)],
        "scale (strength=0.0, x=2)": [edit("scale", 0.0, x=2)],
        "scale (x=3)": [edit("scale", 1.0, x=3)],  # a dose of x, with the second
        "both (strength=0.5)": [edit("one", 0.5), edit("two", 0.5)],
        "both": [edit("one", 1.0), edit("two", 1.0)],
        "mixed": [edit("one", 1.0), edit("two", 0.5)],
        "alone": [edit("alone", 1.0)],
        "flag": [edit("alone", 1.0, flag=True)],
    }
    scores = {"no edit": [1.0] * 7} | {name: [i / 10] * 7 for i, name in enumerate(conditions)}
    found = doses(evaluation(conditions, scores))
    assert list(found["task"].unique()) == ["b", "a"], "not in the order of the tasks"
    rows = found[found["task"] == "a"]
    assert list(zip(rows["edit"], rows["setting"], rows["value"], strict=True)) == [
        ("scale (x=2)", "strength", 0.0),
        ("scale (x=2)", "strength", 0.5),
        ("scale (x=2)", "strength", 1.0),
        ("scale", "x", 2.0),
        ("scale", "x", 3.0),
        ("both", "strength", 0.5),
        ("both", "strength", 1.0),
    ]
    np.testing.assert_allclose(rows["mean"], [0.2, 0.0, 0.1, 0.1, 0.3, 0.4, 0.5])
    np.testing.assert_allclose(rows["random"], [np.nan, 0.5, *[np.nan] * 5])
    assert rows["p_permutation"].iloc[0] == 2 / 2**7


def test_edits_of_one_name_are_told_apart() -> None:
    conditions = {
        "scale (strength=0.5)": [edit("scale", 0.5)],
        "scale": [edit("scale", 1.0)],
        "scale (strength=0.5) #3": [edit("scale", 0.5, heads=[[1, 1]])],
        "scale #4": [edit("scale", 1.0, heads=[[1, 1]])],
    }
    found = doses(evaluation(conditions, {"no edit": [1.0] * 6} | {name: [0.0] * 6 for name in conditions}))
    assert list(found["edit"].unique()) == ["scale", "scale (2)"]


def test_nothing_at_several_doses_has_no_rows() -> None:
    found = doses(evaluation({"alone": [edit("alone", 1.0)]}, {"no edit": [1.0], "alone": [0.5]}))
    assert found.empty and {"task", "edit", "value", "mean"} <= set(found)
    with pytest.raises(HeadscopeError, match="a dose-response plot has no rows"):
        plots.dose_response(found)
    no_conditions = Evaluation.from_rows(
        [{"task": "a", "condition": "no edit", "kind": "baseline", "of": "", "trial": 0, "score": 1.0}], {"a": ""}, {}
    )
    assert doses(no_conditions).empty


def test_the_figure_has_a_line_an_edit_with_its_intervals() -> None:
    conditions = {"scale (strength=0.5)": [edit("scale", 0.5)], "scale": [edit("scale", 1.0)]}
    result = evaluation(
        conditions, {"no edit": [1.0] * 6, "scale (strength=0.5)": [0.1, 0.9] * 3, "scale": [0.2, 0.4] * 3}
    )
    found = doses(result)
    rows = found[found["task"] == "a"]
    fig = plots.dose_response(rows, result.metrics, 1.0)
    line, random = fig.data
    assert list(line.x) == [0.5, 1.0] and list(line.y) == pytest.approx([0.5, 0.3])
    np.testing.assert_allclose(line.error_y.array, rows["ci_high"] - rows["mean"])
    np.testing.assert_allclose(line.error_y.arrayminus, rows["mean"] - rows["ci_low"])
    assert random.y[0] == 0.5 and fig.layout.shapes[0].y0 == 1.0 and "points" in fig.layout.yaxis.title.text


def test_changed_trials_come_with_what_was_said() -> None:
    scores = {"no edit": [1.0, 1.0, 0.0, 0.5, 0.5], "scale": [0.0, 1.0, 1.0, 0.5 + 1e-12, 0.4]}
    result = evaluation(
        {"scale": [edit("scale", 1.0)]},
        scores,
        question=lambda name, trial: f"What is {trial}?",
        length=lambda name, trial: 100 * trial,
        response=lambda name, trial: f"{trial} under {name}",
        new_tokens=lambda name, trial: len(name) + trial,
        listed=lambda name, trial: [name, trial],
        missing=lambda name, trial: None,
        group=lambda name, trial: trial // 2,
    )
    found = changed(result, "a", "scale", count=2)
    assert (found.higher, found.lower, found.same) == (1, 2, 2)
    assert list(found.most["trial"]) == [0, 2] and list(found.most["score change"]) == [-1.0, 1.0]
    assert list(found.most["score before"]) == [1.0, 0.0] and list(found.most["score after"]) == [0.0, 1.0]
    assert list(found.most["what"]) == ["question: What is 0?; length: 0", "question: What is 2?; length: 200"]
    assert list(found.most["response before"]) == ["0 under no edit", "2 under no edit"]
    assert list(found.most["response after"]) == ["0 under scale", "2 under scale"]
    assert not {"listed before", "missing before", "new_tokens before"} & set(found.most)
    assert len(changed(result, "a", "scale").most) == 3
    none = changed(result, "a", "no edit")
    assert (none.higher, none.lower, none.same) == (0, 0, 5) and none.most.empty


def test_long_texts_keep_their_ends() -> None:
    text = clipped("begin " + "x " * 4000 + " end")
    assert len(text) <= LONG + 3 and text.startswith("begin x") and text.endswith("end")
    assert clipped("a\n  b") == "a b" and clipped(None) == clipped(float("nan")) == ""
