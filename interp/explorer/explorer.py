"""``explore``: from a model and a prompt to the explorer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from headscope.interp.errors import HeadscopeError
from headscope.interp.explorer.answers import Answers
from headscope.interp.explorer.export import document
from headscope.interp.explorer.overview import Column, columns_of, columns_of_scores
from headscope.interp.explorer.run import Prompt, Run, record_run
from headscope.interp.models import load_model
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.files import write_atomically
from headscope.interp.sites.given import Loadable
from headscope.interp.statistics.declared import Named

if TYPE_CHECKING:
    from headscope.interp.explorer.widget import ExplorerWidget


class Explorer:
    """One run, or two side by side with their difference, to look at: a notebook shows it, ``save`` writes it.

    Args:
        run: what is shown.
        beside: a second run: another prompt, checkpoint, or the same under an edit. Their difference (``beside`` less
            ``run``) is shown where both have as many tokens and the same heads.
        scores: results of head methods, as further columns of the overview.
        record: a record of the same model, of many prompts say, as further columns: of several examples the mean over
            them with a 95 % bootstrap interval.
        title: by default the run's name.
        height: of the view in a notebook, in pixels.

    What it does not show: why a head looks where it looks, nor what it writes from there; a pattern is no explanation.
    """

    def __init__(
        self,
        run: Run,
        beside: Run | None = None,
        *,
        scores: HeadScores | Sequence[HeadScores] = (),
        record: xr.Dataset | None = None,
        title: str | None = None,
        height: int = 680,
    ) -> None:
        scores = [scores] if isinstance(scores, HeadScores) else list(scores)
        depth, heads = 1 + max(run.layers), max(kept.heads for kept in run.layers.values())
        for one in scores:
            if one.layers < depth or one.heads < heads:
                raise HeadscopeError(
                    f"the scores {one.method!r} are of {one.layers} layers x {one.heads} heads, the run has {depth} x "
                    f"{heads}: give scores of the same model"
                )
        self.runs = [run] if beside is None else [run, beside]
        self.height = height
        columns = [*columns_of_scores(scores), *columns_of([] if record is None else [record], " (record)")]
        self.answers = Answers(self.runs, columns, title or run.name)

    @cached_property
    def widget(self) -> ExplorerWidget:
        """The anywidget (for marimo: ``mo.ui.anywidget(explorer.widget)``).

        Raises:
            HeadscopeError: anywidget is not installed.
        """
        try:
            from headscope.interp.explorer.widget import ExplorerWidget
        except ImportError as error:
            raise HeadscopeError(
                "the live explorer needs anywidget: pip install 'headscope[notebook]', or write a page with save()"
            ) from error
        return ExplorerWidget(self.answers, height=self.height)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.widget._repr_mimebundle_(**options)

    def save(
        self, path: str | Path, *, budget_mb: float = 6.0, heads: HeadSet | str | Iterable[Any] | None = None
    ) -> Path:
        """Write one HTML file that opens offline, of at most ``budget_mb`` megabytes; it says what it left out.

        It holds the overview, the far map of every head, and finer levels, down to the single weight, as far as they
        fit: those of ``heads`` (a HeadSet or names; by default the best of the scores, else those that change most
        between two runs, else those that leave most beside the sink) before the others'. Weights are rounded to 0.8 %.
        Every map in it is exact: a whole map costs a pass over its head's pairs, minutes for all heads of 16,384 tokens
        on a CPU.

        Raises:
            HeadscopeError: heads that the run does not hold, a budget that does not hold the overview, or a file that
                cannot be written.
        """
        chosen = list(HeadSet.of(heads)) if heads is not None else self._best(8)
        missing = [pair for pair in chosen if tuple(pair) not in set(self.answers.heads)]
        if missing:
            raise HeadscopeError(f"the run holds no head L{missing[0][0]}H{missing[0][1]}: choose among its layers")
        facts = {"runs": [run.facts for run in self.runs]}
        page = document(self.answers, [(int(a), int(b)) for a, b in chosen], int(budget_mb * 1e6), facts)
        if len(page) > budget_mb * 1e6:
            raise HeadscopeError(
                f"the overview alone takes {len(page) / 1e6:.1f} MB: give a larger budget_mb, or keep fewer layers"
            )
        write_atomically(path, page)
        return Path(path)

    def _best(self, count: int) -> list[tuple[int, int]]:
        """The heads that a page shows closest: the highest of the first score; else those whose sink mass changed most
        between two runs; else those that leave most beside the sink."""

        def values(column: Column | None) -> dict[tuple[int, int], float]:
            known = {} if column is None else {head: found[0] for head, found in column.values.items()}
            return {head: float(np.nan_to_num(known.get(head, 0.0), nan=-np.inf)) for head in self.answers.heads}

        if self.answers.more:
            value = values(self.answers.more[0])
        else:
            each = [values(next((x for x in own if x.name == "sink_mass"), None)) for own in self.answers.own]
            value = {head: -mass for head, mass in each[0].items()}
            if self.answers.compared:
                value = {head: abs(each[1][head] - mass) for head, mass in each[0].items()}
        return sorted(self.answers.heads, key=lambda head: (-value[head], head))[:count]


def explore(
    lm: Loadable,
    prompt: Prompt,
    *,
    beside: Run | Prompt | None = None,
    spans: Mapping[str, Any] | None = None,
    statistics: Named | Iterable[Named] | None = None,
    scores: HeadScores | Sequence[HeadScores] = (),
    record: xr.Dataset | None = None,
    generate: int = 0,
    layers: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    title: str | None = None,
    height: int = 680,
) -> Explorer:
    """Read a prompt once and open the explorer on every head of the model.

    ``beside`` is a second prompt for the same model, or a run of ``record_run``: another checkpoint's, or the same
    prompt's under an edit (``with apply(lm, edit): beside = record_run(lm, prompt)``). The other arguments are
    ``record_run``'s and ``Explorer``'s; memory is what ``record_run`` says, a run.

    Raises:
        HeadscopeError: as ``record_run`` and ``Explorer``.
    """
    options: dict[str, Any] = {"statistics": statistics, "generate": generate, "layers": layers, "device": device}
    lm = load_model(lm)
    run = record_run(lm, prompt, spans=spans, **options)
    if beside is not None and not isinstance(beside, Run):
        run.name, beside = "first prompt", record_run(lm, beside, name="second prompt", **options)
    return Explorer(run, beside, scores=scores, record=record, title=title or lm.name, height=height)
