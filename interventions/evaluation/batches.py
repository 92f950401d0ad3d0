"""The steps of an evaluation: a trial under a condition, prepared and run alone, or with others as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.journal import Trial
from headscope.interventions.applying import apply
from headscope.interventions.base import Intervention
from headscope.interventions.evaluation.notes import noted, unseen
from headscope.interventions.tasks.base import Task, prepares


def together(task: Task) -> int:
    """How many trials of a condition run as one batch."""
    return 1 if prepares(task) else max(1, getattr(task, "together", 1))


class Batches:
    """Runs ``work[index]``; trials of the same task and condition that follow it are run with it where the task runs
    some together, and their results are kept until they are asked for."""

    def __init__(self, model: LanguageModel, work: Sequence[tuple[Task, Any, Trial]]) -> None:
        self.model, self.work = model, work
        self._held: dict[int, dict[str, Any]] = {}
        self._prepared: tuple[Trial, Trial] | None = None

    def __call__(self, index: int) -> dict[str, Any]:
        """The result of one step."""
        if index not in self._held:
            self._held = self._run(index)
        return self._held.pop(index)

    def _run(self, index: int) -> dict[int, dict[str, Any]]:
        task, condition, trial = self.work[index]
        size = together(task)
        trials = [w[2] for w in self.work[index : index + size] if w[0] is task and w[1] is condition]
        if size == 1:
            trials = [self._prepare(task, trial)]  # with no edit in force
        edits: tuple[Intervention, ...] = condition.edits
        with noted() as notes, apply(self.model, *edits):
            results = [task.run(self.model, trials[0])] if size == 1 else task.run_together(self.model, trials)
        notes += [why for why in (unseen(task, edit) for edit in edits) if why]
        said = {"note": "; ".join(dict.fromkeys(notes))} if notes else {}
        return {index + i: {**result, **said} for i, result in enumerate(results)}

    def _prepare(self, task: Task, trial: Trial) -> Trial:
        """The trial as its task prepared it without an edit; the last one is kept."""
        if not prepares(task):
            return trial
        if self._prepared is None or self._prepared[0] is not trial:
            self._prepared = None  # before the next one is made
            self._prepared = trial, task.prepare(self.model, trial)
        return self._prepared[1]
