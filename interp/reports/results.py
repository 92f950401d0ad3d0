"""From a folder of results to one report: whatever it holds, in the order a reader wants it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from headscope.interp import plots
from headscope.interp.analysis.reliability import split_half
from headscope.interp.errors import HeadscopeError
from headscope.interp.records.record import MANIFEST, load_record
from headscope.interp.reports.cache import add_losses
from headscope.interp.reports.comparison import add_agreements
from headscope.interp.reports.evaluation import add_evaluation
from headscope.interp.reports.opening import what_changed, what_was_found, what_was_run
from headscope.interp.reports.page import Report
from headscope.interp.reports.readable import readable
from headscope.interp.results.cache import NAME, CacheLosses
from headscope.interp.results.evaluation import Evaluation
from headscope.interp.results.scores import HeadScores, find_all


@dataclass(frozen=True)
class Results:
    """Everything readable in a folder and its subfolders, by path."""

    scores: dict[str, HeadScores]
    evaluations: dict[str, Any]
    records: dict[str, Any]
    losses: dict[str, CacheLosses]  # of policies for a cache
    model: str = ""  # as it was named on the command line that made the results

    @classmethod
    def find(cls, folder: Path) -> Results:
        """Read a folder.

        Raises:
            HeadscopeError: it does not exist or holds no result.
        """
        if not folder.is_dir():
            raise HeadscopeError(f"{folder} is not a folder; give the folder that other commands wrote with --out")
        scores = find_all(folder)
        evaluations = {
            str(path.parent.relative_to(folder)): Evaluation.load(path.parent)
            for path in sorted(folder.rglob("evaluation.parquet"))
        }
        records = {str(p.parent.relative_to(folder)): load_record(p.parent) for p in sorted(folder.rglob(MANIFEST))}
        kept = sorted(folder.rglob(f"{NAME}.parquet"))
        losses = {str(path.parent.relative_to(folder)): CacheLosses.load(path.parent) for path in kept}
        if not (scores or evaluations or records or losses):
            raise HeadscopeError(f"{folder} holds no results; run `headscope discover`, `probe`, `trace` or `evaluate`")
        return cls(scores, evaluations, records, losses, _named_model(folder))

    def summary(self) -> list[dict[str, Any]]:
        """One row a method: its best head, and where scores lie in [0, 1], how many heads pass 0.1 (else None)."""
        rows = []
        for found in self.scores.values():
            best = found.to_frame().iloc[0]
            rows.append(
                {
                    "method": found.method,
                    "best_head": f"L{int(best['layer'])}H{int(best['head'])}",
                    "score": float(best["score"]),
                    "ci_low": float(best["ci_low"]),
                    "ci_high": float(best["ci_high"]),
                    "heads_above_0.1": _above_tenth(found),
                    "heads": found.mean.size,
                    "trials": len(found.trials),
                }
            )
        return rows

    def report(self, prompt: str | None, model: str | None) -> Report:
        """Compose the page."""
        first = next(iter([*self.scores.values(), *self.evaluations.values(), *self.losses.values()]), None)
        made = first.provenance if first is not None else {}
        model_of = made.get("model")
        page = Report("headscope report", str(model_of.get("name") or "") if isinstance(model_of, dict) else "")
        self._open(page)
        for found in self.scores.values():
            _add_scores(page, found)
        add_agreements(page, self.scores)
        for place, result in self.evaluations.items():
            add_evaluation(page, result, place)
        for place, lost in self.losses.items():
            add_losses(page.heading(f"What a cache would lose {place}"), lost)
        for place, record in self.records.items():
            page.heading(f"Record {place}")
            for variable in record.data_vars:
                if set(record[variable].dims) == {"example", "layer", "head", "query"}:
                    words = str(variable).replace("_", " ").capitalize()
                    page.figure(plots.statistic_map(record, str(variable)), f"{words}: mean over examples and queries")
        if prompt is not None:
            _add_patterns(page, self.scores, prompt, model or self.model)
        page.provenance({found.method: found.provenance for found in self.scores.values()} or made)
        return page

    def _open(self, page: Report) -> None:
        """What a reader who reads no further should know."""
        every = [*self.scores.values(), *self.evaluations.values(), *self.losses.values()]
        told = {
            "What was run": what_was_run(one.provenance for one in every),
            "Heads found": what_was_found(self.scores.values()),
            "What changed": [line for one in self.evaluations.values() for line in what_changed(one)],
        }
        for title, lines in told.items():
            if lines:
                page.heading(title).text("\n\n".join(lines))
            if lines and title == "Heads found":
                page.table(readable(pd.DataFrame(self.summary())), "Best head of every method")


def _above_tenth(found: HeadScores) -> int | None:
    known = found.trials[~np.isnan(found.trials)]
    return int((found.mean > 0.1).sum()) if ((known >= 0) & (known <= 1)).all() else None


def _named_model(folder: Path) -> str:
    """The model on the command line of the first run that kept its configuration there, or ''.

    Raises:
        HeadscopeError: a configuration that cannot be read.
    """
    for path in sorted(folder.rglob("*.config.json")):
        try:
            model = json.loads(path.read_bytes())["settings"]["model"]
            if not isinstance(model, str):
                raise TypeError(f"the model is {model!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HeadscopeError(
                f"{path} is not a configuration of headscope ({type(error).__name__}); remove it"
            ) from error
        return model
    return ""


def _add_scores(page: Report, found: HeadScores) -> None:
    low, high = found.interval
    title = found.method.replace("_", " ").capitalize()
    told = {name: str(found.provenance.get(name) or "") for name in ("unit", "meaning", "source")}
    label = f"score ({told['unit']})" if told["unit"] else "score"
    page.heading(title)
    if told["meaning"]:
        page.text(f"{told['meaning']} ({told['source']})." if told["source"] else f"{told['meaning']}.")
    with suppress(HeadscopeError):  # a single trial has no halves
        halves = split_half(found)
        page.text(f"{halves.words().capitalize()} (ranks: {halves.spearman:.2f}).")
    page.figure(
        plots.head_map(found.mean, title=title, label=label, low=low, high=high, n=found.n),
        f"Every head; intervals are {found.level:.0%} bootstrap over {len(found.trials)} trials.",
    )
    page.figure(plots.ranked(found, 20, label=label), "The highest-scoring heads with their intervals.")
    grid = pd.DataFrame(list(found.details))
    if {"length", "depth", "recall"} <= set(grid.columns):
        page.figure(
            plots.needle_grid(grid.rename(columns={"recall": "score"})),
            "Needle recall of the unedited model by prompt length and needle depth.",
        )


def _add_patterns(page: Report, scores: dict[str, HeadScores], prompt: str, model: str) -> None:
    from headscope.interp.models import load_model

    if not model:
        raise HeadscopeError("name the model for --prompt with --model")
    lm = load_model(model)
    page.heading("Patterns")
    page.text(f"The top head of each method on: {prompt}")
    seen: set[tuple[int, int]] = set()
    for found in scores.values():
        layer, head = found.top(1).heads[0]
        if (layer, head) in seen:
            continue
        seen.add((layer, head))
        title = f"L{layer}H{head}, top head of {found.method.replace('_', ' ')}"
        page.figure(plots.head_on_prompt(lm, prompt, layer, head, title=title), title)
