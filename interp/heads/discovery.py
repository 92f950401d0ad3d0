"""The driver of every discovery method: run trials, keep them, average them into HeadScores.

A method file builds its trials (JSON-able dicts) and scores one of them; resuming, progress, intervals, provenance and
saving live here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.estimate import announce
from headscope.interp.runs.files import locked
from headscope.interp.runs.journal import Journal, Trial
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance

# scores (layer, head), or None for a trial that is not kept, and what to remember about the trial
Scored = tuple[NDArray[np.float64] | None, dict[str, Any]]


def discover(
    method: str,
    model: Any,
    trials: Sequence[Trial],
    score: Callable[[Trial], Scored],
    *,
    parameters: dict[str, Any],
    seed: int,
    tokens: Callable[[Trial], tuple[int, int]],
    group: str | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> HeadScores:
    """Score every trial and average.

    Args:
        method: the method's name; results are ``out/METHOD.json`` and ``.parquet``.
        model: load_model's result.
        trials: JSON-able descriptions; ``score`` turns one into scores (layer, head) and details.
        tokens: a trial's prompt tokens and generated tokens, for estimates.
        parameters: the method's settings, kept in the provenance and compared when a run is resumed.
        group: the trial key whose equal values are resampled together in the bootstrap.
        out: folder for the results and the journal that makes the run resumable; None keeps everything in memory.

    Raises:
        HeadscopeError: no trial to run, none kept, or ``out`` holds a run with other settings or that goes on now.
    """
    if not trials:
        raise HeadscopeError(f"{method}: there is no trial to run; ask for at least one")
    announce(map(tokens, trials), [f"{method}.json", f"{method}.parquet", f"{method}.trials.jsonl"] if out else [])
    made = provenance(model, seed=seed, **parameters)
    config: dict[str, Any] = {key: made[key] for key in ("model", "parameters", "seed") if key in made}
    config |= {"method": method, "trials": list(trials)}
    path = None if out is None else Path(out) / f"{method}.trials.jsonl"
    with locked(path):
        journal = Journal(path, config)
        waiting = [index for index in range(len(trials)) if index not in journal]
        for index in track(waiting, f"{method} heads", enabled=progress, done=len(trials) - len(waiting)):
            scores, details = score(trials[index])
            kept = None if scores is None else [[_finite(x) for x in row] for row in scores.tolist()]
            journal.add(index, {"scores": kept, "details": details})
        result = _gather(method, trials, journal, made, group)
        if out is not None:
            result.save(out)
    return result


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else value


def _gather(
    method: str, trials: Sequence[Trial], journal: Journal, made: dict[str, Any], group: str | None
) -> HeadScores:
    results = [journal.entries[index] for index in range(len(trials))]
    details = tuple(
        {**trial, **result["details"], "kept": result["scores"] is not None}
        for trial, result in zip(trials, results, strict=True)
    )
    kept = [index for index, result in enumerate(results) if result["scores"] is not None]
    if not kept:
        raise HeadscopeError(
            f"{method}: none of {len(trials)} trials was kept, so no head can be scored; "
            "the model may fail this task at these lengths (see the method's criterion)"
        )
    scores = np.array([results[index]["scores"] for index in kept], dtype=np.float64)
    made = {**made, "trials": len(trials), "kept": len(kept)}
    groups = None
    if group is not None:
        groups = np.unique([str(trials[index][group]) for index in kept], return_inverse=True)[1].astype(np.int64)
    return HeadScores(method, scores, made, groups, details)
