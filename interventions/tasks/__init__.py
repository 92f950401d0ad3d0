"""Evaluation tasks: trials that a model runs, each giving one score. To add one: a file here and a line in TASKS."""

from __future__ import annotations

from collections.abc import Sequence

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import Registry
from headscope.interventions.tasks.base import Task

TASKS: Registry[Task] = Registry(
    "task",
    "tasks",
    "headscope.interventions.tasks",
    {
        "needle": "needle:NeedleTask",
        "text_loss": "text_loss:TextLoss",
    },
)


def resolve(tasks: Sequence[str | Task]) -> list[Task]:
    """Tasks from names (with default settings) or task objects; a single name stands for a list of it."""
    found: list[Task] = []
    for task in [tasks] if isinstance(tasks, str) else tasks:
        if not isinstance(task, str):
            found.append(task)
        else:
            found.append(TASKS[task]())
    if not found:
        raise HeadscopeError("name at least one task to evaluate, e.g. tasks=['needle']")
    names = [task.name for task in found]
    if len(set(names)) < len(names):
        raise HeadscopeError(f"two tasks have the same name ({', '.join(sorted(names))}); evaluate them separately")
    return found
