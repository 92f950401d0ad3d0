"""One page of an experiment: what held, the numbers, every curve, and maps of what a head of a trained model does."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from headscope.interp import plots
from headscope.interp.reports.page import Report
from headscope.interp.results.findings import Findings

MOST = 24  # figures a page


def lab_page(found: Findings) -> Report:
    """Claims beside the paper's figures, the numbers of the seeds, and the curves.

    A label with one row is no curve: of what has a value a head there, the first seed's are drawn as a map (heads of
    two trainings do not correspond), with the interval where ``NAME.low`` and ``NAME.high`` stand beside ``NAME``.
    """
    device = found.provenance.get("device", "")
    page = Report(found.experiment.replace("_", " ").capitalize(), f"{len(found.seeds)} seeds, {device}")
    page.heading("What held, what did not")
    page.table(found.verdicts(), "Claims")
    page.heading("Numbers")
    page.table(found.summary(), "Mean, smallest and largest of the seeds")
    drawn = [
        (label, number, rows)
        for label, rows in found.outcomes[0]["curves"].items()
        for number in (rows[0] if rows else {})
        if number != "step" and not number.endswith((".low", ".high"))
    ]
    if drawn:
        page.heading("Curves")
    for label, number, rows in drawn[:MOST]:
        page.figure(_figure(found, label, number, rows), f"{number} of {label}")
    if len(drawn) > MOST:
        page.text(f"{len(drawn) - MOST} further curves are in findings.json.")
    return page.provenance(found.provenance)


def _figure(found: Findings, label: str, number: str, rows: list[dict[str, Any]]) -> go.Figure:
    if len(rows) > 1 or np.ndim(rows[0][number]) != 2:
        return plots.learning_curve(found, label, number)
    bounds = {end: rows[0][f"{number}.{end}"] for end in ("low", "high") if f"{number}.{end}" in rows[0]}
    title = f"{number} of {label}, seed {found.seeds[0]}"
    return plots.head_map(np.array(rows[0][number], dtype=float), title=title, label=number, **bounds)
