"""What a report says of several head scores: agreement of methods, change between runs, scores by depth."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from headscope.interp import plots
from headscope.interp.analysis.agreement import Agreement, agree, closest_first, found_alike
from headscope.interp.analysis.comparison import Comparison, model_of
from headscope.interp.analysis.difference import Difference
from headscope.interp.analysis.reliability import split_half
from headscope.interp.errors import HeadscopeError
from headscope.interp.reports.page import Report
from headscope.interp.reports.readable import readable
from headscope.interp.results.scores import HeadScores

CAPTION = (
    "Observed agreement beside two nulls: one method's scores shuffled within layers (so that depth is no agreement), "
    "and over all heads. p is two-sided, and adjusted by Holm's method over the pairs."
)


def comparison_page(found: Comparison) -> Report:
    """The page of ``headscope compare``."""
    models = dict.fromkeys(str(model_of(one)[0] or "") for one in found.scores.values())
    page = Report("headscope compare", " and ".join(name for name in models if name))
    told = [{"scores": name, "trials": len(one.trials), **_reliability(one)} for name, one in found.scores.items()]
    page.heading("What is compared").table(pd.DataFrame(told), "Head scores, and how reliable they are by themselves")
    for note in found.notes:
        page.text(note[0].upper() + note[1:] + ".")
    if found.agreement is not None:
        add_agreement(page, found.agreement)
    for one in found.differences:
        _add_difference(page, one)
    if len(found.depth):
        page.heading("By relative depth").table(
            readable(found.depth), "Scores pooled by relative depth of their layers"
        )
    return page.provenance({name: one.provenance for name, one in found.scores.items()})


def add_agreements(page: Report, scores: Mapping[str, HeadScores]) -> None:
    """A section for every model of which two methods or more are there, the first scores of each.

    Scores that cannot be compared (no layer that all of them score) are said to be so.
    """
    models: dict[object, dict[str, HeadScores]] = {}
    for one in scores.values():
        models.setdefault(model_of(one), {}).setdefault(one.method, one)
    several = {model: held for model, held in models.items() if len(held) > 1}
    for model, held in several.items():
        name = str(model[0] or "") if isinstance(model, tuple) else ""
        title = "Agreement of methods" + (f": {name}" if len(several) > 1 else "")
        try:
            found = agree(list(held.values()))
        except HeadscopeError as error:
            page.heading(title).text(f"Not compared: {error}.")
            continue
        add_agreement(page, found, title)


def add_agreement(page: Report, found: Agreement, title: str = "Agreement of methods") -> None:
    """Heat maps, scatter and tables of which methods find the same heads."""
    found = found.renamed([name.replace("_", " ") for name in found.names])
    page.heading(title)
    page.text(f"{found.heads} heads, of which the {found.k} highest of every two methods are compared.")
    if found.left_out:
        page.text(f"Layers without a score by some method are left out: {', '.join(map(str, found.left_out))}.")
    alike = list(found_alike(found)) or ["No two methods share more top heads than shuffles within layers do."]
    page.text("\n\n".join(line.rstrip(".") + "." for line in alike))
    page.figure(plots.agreement_map(found, "spearman"), "Spearman's rank correlation over all heads.")
    page.figure(plots.agreement_map(found, "jaccard"), f"Jaccard index of the {found.k} highest heads.")
    page.figure(plots.score_scatter(found), "Every head by two methods; the menu chooses them.")
    each = 5 if len(found.names) > 2 else 10
    page.table(found.ranks(each), f"The {each} best heads of every method, with their rank by all of them")
    page.table(readable(closest_first(found.to_frame())), CAPTION)


def _add_difference(page: Report, found: Difference) -> None:
    """The map of changes, the heads that changed, and how alike the runs are."""
    first, second = found.names
    title = f"{found.method.replace('_', ' ')}: {first} to {second}"
    page.heading(title[0].upper() + title[1:]).text(found.words()[0].upper() + found.words()[1:] + ".")
    page.figure(
        plots.head_map(found.change, title="Change", label="change", low=found.low, high=found.high, diverging=True),
        f"{second} minus {first}; intervals are {found.level:.0%} bootstrap, each head's own.",
    )
    page.figure(plots.score_scatter(found.agreement), f"Every head in {first} and in {second}.")
    changed = found.to_frame().query("apart").drop(columns="apart").head(20)
    page.table(readable(changed), "The largest changes whose interval excludes 0")
    page.table(readable(found.agreement.to_frame()), CAPTION)


def _reliability(scores: HeadScores) -> dict[str, float]:
    names = ("pearson", "spearman", "overlap", "overlap_by_chance")
    try:
        found = split_half(scores)
    except HeadscopeError:  # a single trial or group: no half
        return {f"split_half_{name}": float("nan") for name in names}
    return {f"split_half_{name}": float(getattr(found, name)) for name in names}
