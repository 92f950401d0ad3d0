"""Which heads to calibrate: each is tried by itself, and kept where the answers get better."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.results.headset import HeadSet
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.progress import track
from headscope.interp.sites.given import ModelLike
from headscope.interventions.applying import apply, size
from headscope.interventions.attention.calibrate import CalibrateAttention
from headscope.interventions.tasks.base import Task


@dataclass(frozen=True)
class Calibrated:
    """What ``calibrated_heads`` found.

    ``heads``: those kept, weighted by their gain, highest first. ``tried``: every head's mean score over tasks on the
    half that chooses, and ``plain`` without an edit. ``held_out`` and ``plain_held_out``: on the other half, all of
    ``heads`` calibrated together and no edit; NaN for ``held_out`` where none was kept.
    """

    heads: HeadSet
    plain: float
    tried: dict[tuple[int, int], float]
    plain_held_out: float
    held_out: float


def calibrated_heads(
    model: ModelLike,
    tasks: Sequence[Task],
    heads: Iterable[tuple[int, int]] | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> Calibrated:
    """The heads whose calibration, each by itself, raises the accuracy on a calibration set.

    The head search of ACT, Yu et al. 2024 (arXiv 2406.15765): the whole set is run with ``CalibrateAttention`` on one
    head after the other, and a head is kept if the accuracy, averaged over data sets (``tasks``), exceeds the
    uncalibrated one. [OURS]: heads are chosen on a random half of every task's trials and judged together on the other,
    because the best of many heads looks good on the trials that chose it. The authors search layers 2 to 30 of 32, and
    their script the first four heads of each; the rule itself is not in their code.

    Args:
        model: load_model's result.
        tasks: each is a data set whose mean score is its accuracy; higher must be better.
        heads: those to try (by default all from the third layer to the last but one).
        seed: of the halves.
        settings: of ``CalibrateAttention``, such as ``threshold=0.15``.

    Raises:
        HeadscopeError: no task, one whose lower scores are better, or one with fewer than two trials.
    """
    lm = load_model(model)
    halves = [_halves(task, task.trials(lm), seed) for task in tasks]
    if not halves:
        raise HeadscopeError("give at least one task to choose heads by")
    layers, count = size(lm)
    given = heads if heads is not None else [(i, h) for i in range(2, layers - 1) for h in range(count)]
    candidates = HeadSet.of(list(given))

    def score(edit: CalibrateAttention | None, half: int) -> float:
        means = []
        for task, parts in zip(tasks, halves, strict=True):
            with apply(lm, *([] if edit is None else [edit])):
                means.append(np.mean([float(task.run(lm, trial)["score"]) for trial in parts[half]]))
        return float(np.mean(means))

    plain = score(None, 0)
    tried = {}
    for head in track(list(candidates), "calibrated heads", enabled=progress):
        tried[head] = score(CalibrateAttention(HeadSet((head,)), **settings), 0)
    kept = sorted((head for head in tried if tried[head] > plain), key=lambda head: (plain - tried[head], head))
    chosen = HeadSet(tuple(kept), tuple(tried[head] - plain for head in kept), name="calibrated")
    together = score(CalibrateAttention(chosen, **settings), 1) if kept else float("nan")
    return Calibrated(chosen, plain, tried, score(None, 1), together)


def _halves(task: Task, trials: Sequence[Trial], seed: int) -> tuple[list[Trial], list[Trial]]:
    if not task.higher_is_better or len(trials) < 2:
        raise HeadscopeError(
            f"heads are chosen by an accuracy over two or more trials; {task.name} has {len(trials)}, and "
            f"higher_is_better={task.higher_is_better}"
        )
    order = np.random.default_rng(seed).permutation(len(trials))
    middle = (len(trials) + 1) // 2
    return [trials[i] for i in order[:middle]], [trials[i] for i in order[middle:]]
