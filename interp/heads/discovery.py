"""The driver of every head method: run trials, keep them, average them into HeadScores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import HeadMethod, Measured, Scored
from headscope.interp.heads.bench import Bench, Piece
from headscope.interp.heads.passes import batches
from headscope.interp.heads.passes import run as run_batch
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import summary
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.actors import Ray, engine_of
from headscope.interp.runs.elsewhere import maker
from headscope.interp.runs.estimate import announce
from headscope.interp.runs.files import folder_of
from headscope.interp.runs.journal import Journal, Trial
from headscope.interp.runs.loop import opened, run_steps
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance


def discover(
    methods: Sequence[HeadMethod],
    lm: Any,
    *,
    out: str | Path | None = None,
    progress: bool = True,
    engine: Ray | str | None = None,
) -> list[HeadScores]:
    """Score the heads of a model by several methods, which share forward passes where they read the same samples.

    Args:
        methods: declarations with their settings.
        lm: load_model's result, or what load_model takes.
        out: folder for the results (``NAME.json``, ``NAME.parquet``) and the journals that make the run resumable; None
            keeps everything in memory.
        engine: ``"ray"`` or a ``headscope.interp.runs.actors.Ray``: the trials run in actors, each with a model of its
            own; None: here.

    Raises:
        HeadscopeError: no method, two of one name, no trial to run, none kept, or ``out`` holds a run with other
            settings or that goes on now.
    """
    names = [method.name for method in methods]
    if not names or len(set(names)) < len(names):
        raise HeadscopeError(f"name at least one head method, and each once; got {', '.join(names) or 'none'}")
    given, actors = lm, engine_of(engine)
    folder, lm = folder_of(out), load_model(lm)
    trials = [_trials(method, lm) for method in methods]
    announce(
        _passes(methods, lm, trials),
        [f"{name}.{end}" for name in names for end in ("json", "parquet", "trials.jsonl")] if folder else [],
    )
    with ExitStack() as stack:
        runs = [stack.enter_context(_started(*one, lm, folder)) for one in zip(methods, trials, strict=True)]
        if actors is not None:
            _elsewhere(runs, lm, actors, maker(given, lm), progress)
        _measure([run for run in runs if isinstance(run.method, Measured)], lm, progress)
        for run in runs:
            step = run.step(lm)
            run_steps(run.journal, len(run.trials), step, f"{run.method.name} heads", progress=progress)
        return [run.gather(folder) for run in runs]


@dataclass(frozen=True, eq=False)
class _Run:
    """One method at work: its trials, and what is finished of them."""

    method: HeadMethod
    trials: Sequence[Trial]
    journal: Journal
    made: dict[str, Any]

    def waiting(self) -> list[int]:
        """The trials that are not finished."""
        return [index for index in range(len(self.trials)) if index not in self.journal]

    def step(self, lm: LanguageModel) -> Any:
        """A trial by its index, as the journal keeps it."""
        return lambda index: _kept(self.method.score(lm, self.trials[index]))

    def gather(self, folder: Path | None) -> HeadScores:
        """The scores of all kept trials, saved to ``folder``."""
        name, results = self.method.name, [self.journal.entries[index] for index in range(len(self.trials))]
        kept = [index for index, result in enumerate(results) if result["scores"] is not None]
        if not kept:
            raise HeadscopeError(
                f"{name}: none of {len(results)} trials was kept, so no head can be scored; {self.method.unkept}"
            )
        details = [result["details"] for result in results]
        told = [{**t, **d, "kept": i in set(kept)} for i, (t, d) in enumerate(zip(self.trials, details, strict=True))]
        made = {**self.made, "trials": len(results), "kept": len(kept), **self.method.summary(details)}
        groups = None
        if self.method.resample_by is not None:
            labels = [str(self.trials[index][self.method.resample_by]) for index in kept]
            groups = np.unique(labels, return_inverse=True)[1].astype(np.int64)
        scores = np.array([results[index]["scores"] for index in kept], dtype=np.float64)
        found = HeadScores(name, scores, made, groups, tuple(told))
        if folder is not None:
            found.save(folder)
        return found


@contextmanager
def _started(method: HeadMethod, trials: Sequence[Trial], lm: LanguageModel, folder: Path | None) -> Iterator[_Run]:
    made = provenance(lm, seed=method.seed, **method.parameters(lm))
    config: dict[str, Any] = {key: made[key] for key in ("model", "parameters", "seed") if key in made}
    config |= {"method": method.name, "trials": list(trials)}
    made |= {"unit": method.unit, "range": method.range, "source": method.source, "per": method.per}
    made["meaning"] = summary(type(method))
    path = None if folder is None else folder / f"{method.name}.trials.jsonl"
    with opened(path, config) as journal:
        yield _Run(method, trials, journal, made)


def _measure(runs: Sequence[_Run], lm: LanguageModel, progress: bool) -> None:
    """Finish the trials of measured methods in the fewest forward passes."""
    by_method = {id(run.method): run for run in runs}
    waiting = [(run.method, run.waiting()) for run in runs if isinstance(run.method, Measured)]
    for batch in track(batches(lm, waiting), "forward passes", enabled=progress):
        for place, (method, found) in enumerate(run_batch(lm, batch)):
            for trial, scored in zip(batch.trials[place], found, strict=True):
                by_method[id(method)].journal.add(trial, _kept(scored))


def _elsewhere(
    runs: Sequence[_Run], lm: LanguageModel, actors: Ray, make: Callable[[], LanguageModel], progress: bool
) -> None:
    """Finish all trials in actors, which are given a batch of measured methods, or one trial of another, at a time."""
    at = {id(run.method): number for number, run in enumerate(runs)}
    waiting = [(run.method, run.waiting()) for run in runs if isinstance(run.method, Measured)]
    shared = batches(lm, waiting)
    pieces: list[Piece] = [Piece(tuple(at[id(one)] for one in batch.methods), batch=batch.bare()) for batch in shared]
    alone = [run for run in runs if not isinstance(run.method, Measured)]
    pieces += [Piece((at[id(run.method)],), run.trials[trial], trial) for run in alone for trial in run.waiting()]
    methods = [replace(run.method) for run in runs]  # without what a method keeps of a model
    finished = actors.map(partial(Bench, make, methods), Bench.run, pieces) if pieces else iter(())
    for number, found in track(finished, "pieces in workers", enabled=progress, total=len(pieces)):
        piece = pieces[number]
        trials = [(piece.number,)] if piece.batch is None else piece.batch.trials
        for method, those, scores in zip(piece.methods, trials, found, strict=True):
            for trial, scored in zip(those, scores, strict=True):
                runs[method].journal.add(trial, _kept(scored))


def _trials(method: HeadMethod, lm: LanguageModel) -> Sequence[Trial]:
    trials = method.trials(lm)
    if not trials:
        raise HeadscopeError(f"{method.name}: there is no trial to run; ask for at least one")
    return trials


def _passes(
    methods: Sequence[HeadMethod], lm: LanguageModel, trials: Sequence[Sequence[Trial]]
) -> Iterator[tuple[int, int]]:
    """Prompt and generated tokens of everything that is run, for estimates; shared passes count once."""
    measured = [(m, range(len(t))) for m, t in zip(methods, trials, strict=True) if isinstance(m, Measured)]
    for batch in batches(lm, measured):
        yield from ((len(view.ids), 0) for views in batch.views for view in views)
    for method, those in zip(methods, trials, strict=True):
        if not isinstance(method, Measured):
            yield from (method.tokens(lm, trial) for trial in those)


def _kept(scored: Scored) -> dict[str, Any]:
    scores, details = scored
    rows = None if scores is None else [[None if np.isnan(x) else x for x in row] for row in scores.tolist()]
    return {"scores": rows, "details": details}
