"""Exemplars as a page: every head's top prompts and some of each decile, with their tokens marked."""

from __future__ import annotations

from collections.abc import Sequence

from headscope.interp.reports.page import Report
from headscope.interp.statistics.declared import unit_of
from headscope.interp.sweeps.exemplars import Exemplar, Exemplars, HeadExemplars


def page(found: Exemplars, model: str) -> Report:
    """The exemplars as a report; colours of a head lie between the least and the largest value shown of it."""
    words, unit = found.statistic.replace("_", " "), unit_of(found.statistic)
    report = Report(f"Exemplars of {words}", model)
    report.text(
        f"Prompts by the {'largest' if found.per == 'max' else 'mean'} value of {words}{f' ({unit})' if unit else ''} "
        f"of a head's queries, of {found.prompts:,} prompts; deciles are of {found.ranked:,} of them. Tokens are "
        "queries, marked by their own value."
    )
    for head in found.heads:
        _add(report, head)
    return report.provenance(found.provenance)


def _add(report: Report, head: HeadExemplars) -> None:
    every = [*head.top, *(one for decile in head.deciles for one in decile.exemplars)]
    values = [value for one in every for value in one.values if value is not None]
    ends = min(values), max(values)
    name = f"L{head.layer}H{head.head}"
    report.heading(f"{name}: top prompts")
    _lines(report, head.top, ends)
    report.heading(f"{name}: deciles, highest first")
    for decile in reversed(head.deciles):
        place = f"Decile {decile.decile} ({decile.low:.4g} to {decile.high:.4g}, {decile.prompts:,} prompts), "
        _lines(report, decile.exemplars, ends, place)


def _lines(report: Report, exemplars: Sequence[Exemplar], ends: tuple[float, float], place: str = "") -> None:
    for one in exemplars:
        caption = f"{place}prompt {one.example}: {one.score:.4g}"
        if len(one.tokens) < one.length:
            caption += f" (tokens {one.start} to {one.start + len(one.tokens) - 1} of {one.length})"
        report.tokens(one.tokens, one.values, caption, low=ends[0], high=ends[1])
