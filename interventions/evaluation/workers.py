"""Trials of an evaluation in actors: each holds the model and puts the edits of a trial's condition in force itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.actors import Ray
from headscope.interp.runs.journal import Journal, Trial
from headscope.interp.runs.progress import track
from headscope.interventions.evaluation.batches import Batches, together
from headscope.interventions.tasks.base import Task, prepares

SHARED = 8  # conditions that share what a task prepared for a trial, which every worker prepares anew


@dataclass(frozen=True, eq=False)
class Piece:
    """Steps that are run at once, by their numbers: trials of one task, each under a condition, both by their place."""

    steps: tuple[int, ...]
    task: int
    conditions: tuple[int, ...]
    trials: tuple[Trial, ...]


class Bench:
    """A model, and the tasks and conditions that are tried on it."""

    def __init__(self, make: Callable[[], LanguageModel], tasks: Sequence[Task], conditions: Sequence[Any]) -> None:
        self.lm, self.tasks, self.conditions = make(), tasks, conditions

    def run(self, piece: Piece) -> list[dict[str, Any]]:
        """The result of every step of the piece."""
        under = [self.conditions[number] for number in piece.conditions]
        work = [(self.tasks[piece.task], one, trial) for one, trial in zip(under, piece.trials, strict=True)]
        step = Batches(self.lm, work)
        return [step(index) for index in range(len(work))]


def run_elsewhere(
    journal: Journal,
    work: Sequence[tuple[Task, Any, Trial]],
    actors: Ray,
    make: Callable[[], LanguageModel],
    *,
    progress: bool,
) -> None:
    """Run the steps of ``work`` that ``journal`` lacks in ``actors``, and add their results to it as they come."""
    tasks = list({id(task): task for task, _, _ in work}.values())
    conditions = list({id(one): one for _, one, _ in work}.values())
    pieces = list(_pieces(journal, work, tasks, conditions))
    if not pieces:
        return
    finished = actors.map(partial(Bench, make, tasks, conditions), Bench.run, pieces)
    for number, results in track(finished, "evaluate in workers", enabled=progress, total=len(pieces)):
        for index, result in zip(pieces[number].steps, results, strict=True):
            journal.add(index, result)


def _pieces(
    journal: Journal, work: Sequence[tuple[Task, Any, Trial]], tasks: list[Task], conditions: list[Any]
) -> Iterator[Piece]:
    """What is not finished: trials that one process would run as one batch, or conditions of one prepared trial."""
    places = {id(one): place for those in (tasks, conditions) for place, one in enumerate(those)}
    held: list[int] = []

    def piece() -> Piece:
        mine = [work[index] for index in held]
        under = tuple(places[id(condition)] for _, condition, _ in mine)
        return Piece(tuple(held), places[id(mine[0][0])], under, tuple(trial for _, _, trial in mine))

    for index, (task, condition, trial) in enumerate(work):
        if index in journal:
            continue
        if held:
            first = work[held[0]]
            size, shared = (SHARED, trial is first[2]) if prepares(task) else (together(task), condition is first[1])
            if task is not first[0] or not shared or len(held) == size:
                yield piece()
                held = []
        held.append(index)
    if held:
        yield piece()
