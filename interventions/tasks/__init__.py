"""Evaluation tasks: trials that a model runs, each giving one score. To add one: a file here and a line in TASKS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import Registry, make
from headscope.interventions.tasks.base import Task, check_task

TASKS: Registry[Task] = Registry(
    "task",
    "tasks",
    "headscope.interventions.tasks",
    {
        "needle": "needle:NeedleTask",
        "multiple_choice": "multiple_choice:MultipleChoice",
        "documents": "documents:DocumentsTask",
        "arithmetic": "arithmetic:Arithmetic",
        "facts": "facts:Facts",
        "few_shot": "few_shot:FewShot",
        "embedding_position": "embedding_position:EmbeddingPosition",
        "text_loss": "text_loss:TextLoss",
        "text_kl": "text_kl:TextKL",
        "hallucination": "hallucination:Hallucination",
        "pope": "pope:Pope",
        "spatial": "spatial:Spatial",
        "lm_eval": "lm_eval:LmEval",
    },
)


def resolve(tasks: str | Task | Sequence[str | Task]) -> list[Task]:
    """Tasks from names (with default settings) or task objects; one alone stands for a list of it.

    Raises:
        HeadscopeError: an unknown name, an object that is no task, two of one name, or none.
    """
    given: Sequence[Any] = tasks if isinstance(tasks, list | tuple) else [tasks]
    found: list[Task] = [make(TASKS[task], task, {}) if isinstance(task, str) else task for task in given]
    for task in found:
        check_task(task)
    if not found:
        raise HeadscopeError("name at least one task to evaluate, e.g. tasks=['needle']")
    names = [task.name for task in found]
    if len(set(names)) < len(names):
        raise HeadscopeError(f"two tasks have the same name ({', '.join(sorted(names))}); evaluate them separately")
    return found
