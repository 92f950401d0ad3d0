"""One page of an experiment: what held, the numbers, and every curve."""

from __future__ import annotations

from headscope.interp import plots
from headscope.interp.reports.page import Report
from headscope.interp.results.findings import Findings

MOST = 24  # figures a page


def lab_page(found: Findings) -> Report:
    """Claims beside the paper's figures, the numbers of the seeds, and the curves."""
    device = found.provenance.get("device", "")
    page = Report(found.experiment.replace("_", " ").capitalize(), f"{len(found.seeds)} seeds, {device}")
    page.heading("What held, what did not")
    page.table(found.verdicts(), "Claims")
    page.heading("Numbers")
    page.table(found.summary(), "Mean, smallest and largest of the seeds")
    drawn = [
        (label, number)
        for label, rows in found.outcomes[0]["curves"].items()
        for number in (rows[0] if rows else {})
        if number != "step"
    ]
    if drawn:
        page.heading("Curves")
    for label, number in drawn[:MOST]:
        page.figure(plots.learning_curve(found, label, number), f"{number} of {label}")
    if len(drawn) > MOST:
        page.text(f"{len(drawn) - MOST} further curves are in findings.json.")
    return page.provenance(found.provenance)
