"""What a task is: trials that a model runs, each giving one score."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pandas as pd

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_counts, check_numbers
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.provenance import describe, hash_texts

LONG = 200  # characters, above which a text is kept as its hash
METHODS = {"trials": 1, "tokens": 2, "run": 2, "parameters": 1}  # what evaluate calls, and with how many arguments


@dataclass(frozen=True)
class Task:
    """Base of the tasks: frozen dataclasses whose fields are their settings. A subclass writes ``trials`` and ``run``.

    Whoever builds a prompt in ``run`` says where it ends and what stands in it (``prompt_boundary`` and
    ``published_spans`` of ``headscope.interp.prompts``), for edits that go by phase or by a span's name.

    ``evaluate`` also takes any other object with these attributes and methods.
    """

    name: ClassVar[str] = ""
    metric: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool | None] = None
    source: ClassVar[str] = ""

    @property
    def together(self) -> int:
        """How many trials of a condition ``run_together`` takes at a time."""
        return 1

    def __post_init__(self) -> None:
        check_numbers(self, self.name)

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """The trials for this model, JSON-able, the same at every call."""
        raise NotImplementedError

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        """A trial's prompt tokens and generated tokens, for estimates."""
        raise NotImplementedError

    def run(self, lm: LanguageModel, trial: Trial) -> dict[str, Any]:
        """Run one trial on the model as it is now (interventions included); at least ``{"score": float}``."""
        raise NotImplementedError

    def run_together(self, lm: LanguageModel, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """The results of several trials, at most ``together`` of them; a task that runs them as one batch says how."""
        return [self.run(lm, trial) for trial in trials]

    def prepare(self, lm: LanguageModel, trial: Trial) -> Trial:
        """The trial with what the unedited model has to say of it, where ``run`` compares with that: called before the
        trial's conditions, with no edit in force. What it adds need not be JSON-able and is kept until they have run.
        """
        return trial

    def summarise(self, trials: pd.DataFrame) -> dict[str, float]:
        """What a condition's trials say beside their mean score, by name: none, unless a task has something.

        ``trials`` has one row a trial: its scalars and what ``run`` returned.
        """
        return {}

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        """The settings, JSON-able: two runs with equal settings have equal trials. Texts are hashed."""
        return {field.name: _described(getattr(self, field.name)) for field in fields(self)}


def check_least(task: Task, **least: int) -> None:
    """Refuse numbers, or one of several, below the least that they may be; None is left alone.

    Raises:
        HeadscopeError: names the setting.
    """
    for setting, low in least.items():
        given = getattr(task, setting)
        each = given if isinstance(given, list | tuple) else [given]
        if not each:
            raise HeadscopeError(f"{task.name}: {setting} is empty; name at least one")
        for one in each:
            check_counts(low, **{f"{task.name}: {setting}": one})


def check_among(task: Task, **choices: Sequence[str]) -> None:
    """Refuse a setting, or one of several, that is none of its choices.

    Raises:
        HeadscopeError: names the setting and the choices.
    """
    for setting, known in choices.items():
        given = getattr(task, setting)
        each = given if isinstance(given, list | tuple) else [given]
        if not each or any(one not in known for one in each):
            raise HeadscopeError(f"{task.name}: {setting} is one of {', '.join(known)}; got {given!r:.60}")


def check_task(task: Any) -> None:
    """Refuse an object that ``evaluate`` cannot run.

    Raises:
        HeadscopeError: names what it lacks, or the method that takes other arguments.
    """
    what = f"task {getattr(task, 'name', None) or type(task).__name__!r}"
    missing = [name for name in ("name", "metric", *METHODS) if not hasattr(task, name)]
    if missing:
        raise HeadscopeError(f"{what} has no {', '.join(missing)}: derive it from interventions.tasks.base.Task")
    for name, count in METHODS.items():
        try:
            inspect.signature(getattr(task, name)).bind(*[None] * count)
        except TypeError as error:
            called = f"{name}(lm)" if count == 1 else f"{name}(lm, trial)"
            raise HeadscopeError(f"{what}: evaluate calls {called}; make it a method that takes these") from error


def prepares(task: Any) -> bool:
    """Whether a task compares with the unedited model."""
    return getattr(type(task), "prepare", Task.prepare) is not Task.prepare


def _described(value: Any) -> Any:
    if isinstance(value, str) and len(value) > LONG:
        return {"sha256": hash_texts([value])}
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    return describe(value)
