"""What a report says of an evaluation: effects, controls, dose and response, and the trials that changed."""

from __future__ import annotations

import pandas as pd

from headscope.interp import plots
from headscope.interp.reports.page import Report
from headscope.interp.reports.readable import readable
from headscope.interp.results import details
from headscope.interp.results.changed import changed
from headscope.interp.results.doses import doses
from headscope.interp.results.evaluation import Evaluation
from headscope.interp.results.paired import FEW

SHOWN = 12  # tables of changed trials; each has the five that changed most
METHOD = (
    "Every condition ran the same trials; differences are paired. p is of a permutation test of the differences, "
    "adjusted by Holm's method over the tasks of a condition. Random heads are drawn from the same layers, random "
    "vectors have the norms of those in whose place they stand."
)


def add_evaluation(page: Report, result: Evaluation, place: str) -> None:
    """The section of an evaluation that was found at ``place`` in a folder of results."""
    page.heading("Evaluation" if place in ("", ".") else f"Evaluation: {place}").text(METHOD)
    summary, contrasts = result.summary(), result.contrasts()
    for line in [*few(summary), *notes(result)]:
        page.text(line)
    page.figure(
        plots.evaluation(summary, result.metrics), "Scores and differences from no edit, 95 % bootstrap intervals."
    )
    table = summary[summary["kind"] != "control"].drop(columns=["kind", "of", "groups"])
    page.table(readable(table), "Every condition beside no edit")
    if len(contrasts):
        page.table(readable(contrasts), "Each intervention against its random controls")
    for task, beside in details.tables(result.details).items():
        page.table(beside, f"{task}: what it says beside its mean; random controls: the mean over their sets")
    _add_doses(page, result, summary)
    _add_changed(page, result, summary)
    _add_needles(page, result)


def notes(result: Evaluation) -> list[str]:
    """A sentence for every task and condition in which an edit said that it changed nothing."""
    trials = result.trials
    if "note" not in trials:
        return []
    said = trials[trials["note"].notna() & (trials["kind"] != "control")]
    each = said.groupby(["task", "condition", "note"], sort=False).size()
    return [f"{task}, {condition}: {note} ({count} trials)" for (task, condition, note), count in each.items()]


def few(summary: pd.DataFrame) -> list[str]:
    """A sentence for every task with too few independent trials for an interval or a p to say much."""
    tasks = summary.drop_duplicates("task")
    return [
        f"{task}, {count} independent trial{'s' if count > 1 else ''}: with fewer than {FEW} no p can be below 0.05, "
        "and intervals are too short or missing."
        for task, count in zip(tasks["task"], tasks["groups"], strict=True)
        if count < FEW
    ]


def _add_doses(page: Report, result: Evaluation, summary: pd.DataFrame) -> None:
    found = doses(result)
    base = summary[summary["kind"] == "baseline"].set_index("task")["mean"]
    for (task, setting), rows in found.groupby(["task", "setting"], sort=False):
        figure = plots.dose_response(rows, result.metrics, float(base[task]))
        page.figure(figure, f"{task}: score against {setting}, 95 % bootstrap intervals; dotted: no edit.")
    if len(found):
        page.table(readable(found.drop(columns="condition")), "Dose and response")


def _add_changed(page: Report, result: Evaluation, summary: pd.DataFrame) -> None:
    """The trials that every intervention changed most, at most ``SHOWN`` tables of them."""
    pairs = summary[summary["kind"] == "intervention"][["task", "condition"]].itertuples(index=False)
    found = [changed(result, task, condition) for task, condition in pairs]
    moved = [one for one in found if len(one.most)]
    if not found:
        return
    page.heading("Trials that changed")
    if not moved:
        page.text("No intervention changed the score of any trial.")
    for one in moved[:SHOWN]:
        counts = f"{one.higher} trials scored higher, {one.lower} lower, {one.same} the same"
        page.table(one.most, f"{one.task}, {one.condition}: {counts}; those that changed most")
    if len(moved) > SHOWN:
        page.text(f"{len(moved) - SHOWN} more conditions changed trials and are not shown here.")


def _add_needles(page: Report, result: Evaluation) -> None:
    """Needle grids of what is no control."""
    for task in result.metrics:
        part = result.trials[result.trials["task"] == task]
        if not {"length", "depth"} <= set(part.columns) or part["length"].isna().any():
            continue
        for condition in part.loc[part["kind"] != "control", "condition"].unique():
            grid = part.loc[part["condition"] == condition, ["length", "depth", "score"]]
            page.figure(plots.needle_grid(grid), f"{task}, {condition}: score by prompt length and needle depth")
