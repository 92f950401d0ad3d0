"""What is named on a command line as tasks and edits of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import make, shared_out
from headscope.interp.results.scores import HeadScores
from headscope.interventions.base import Intervention
from headscope.interventions.tasks import TASKS
from headscope.interventions.tasks.base import Task


def named_tasks(names: Sequence[str], given: Mapping[str, Any]) -> list[Task]:
    """Tasks by name, each with those of the settings ``given`` that it has.

    Raises:
        HeadscopeError: an unknown task, or a setting that none of them has.
    """
    classes = {name: TASKS[name] for name in names}
    found = shared_out(classes, given)
    return [make(cls, name, found[name]) for name, cls in classes.items()]


def swept(edits: Sequence[Intervention], name: str, values: Sequence[Any]) -> list[Intervention]:
    """Every edit with every value of one setting: a dose and its response.

    Raises:
        HeadscopeError: an edit that has no such setting, or refuses a value.
    """
    return [edit.with_settings(**{name: value}) for edit in edits for value in values]


def overlap(tasks: Sequence[Task], model: LanguageModel, scores: HeadScores) -> list[str]:
    """A sentence for every task that judges heads on the needles that they were found with."""
    used = set((scores.provenance.get("parameters") or {}).get("needles") or ())
    found = []
    for task in tasks:
        both = [name for name in task.parameters(model).get("needles") or () if name in used]
        if both:
            found.append(
                f"{task.name} asks for needles that the heads were found with ({', '.join(both)}); judge them on "
                "others, e.g. without --set needles=..."
            )
    return found
