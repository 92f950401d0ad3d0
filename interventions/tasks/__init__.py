"""Evaluation tasks: trials that a model runs, each giving one score. To add one: a class here and a line in TASKS."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts import NeedleTask
from headscope.interventions.tasks.base import Task
from headscope.interventions.tasks.text_loss import TextLoss

TASKS: dict[str, Callable[..., Task]] = {"needle": NeedleTask, "text_loss": TextLoss}


def resolve(tasks: Sequence[str | Task]) -> list[Task]:
    """Tasks from names (with default settings) or task objects; a single name stands for a list of it."""
    found: list[Task] = []
    for task in [tasks] if isinstance(tasks, str) else tasks:
        if not isinstance(task, str):
            found.append(task)
        elif task in TASKS:
            found.append(TASKS[task]())
        else:
            raise HeadscopeError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if not found:
        raise HeadscopeError("name at least one task to evaluate, e.g. tasks=['needle']")
    names = [task.name for task in found]
    if len(set(names)) < len(names):
        raise HeadscopeError(f"two tasks have the same name ({', '.join(sorted(names))}); evaluate them separately")
    return found
