"""Any task of lm-evaluation-harness, by name or YAML file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.provenance import hash_texts
from headscope.interventions.tasks.base import Task, check_least

if TYPE_CHECKING:
    from headscope.interventions.tasks.harness import Runner


@dataclass(frozen=True, eq=False)
class LmEval(Task):
    """A task, group or tag of lm-evaluation-harness with the edit in force; a trial is one of its documents.

    Prompts, requests and metrics are lm-evaluation-harness's own, through its ``HFLM`` on the loaded model; the score
    is one metric's value of a document before aggregation, with the metric's direction. Of perplexities it is the loss:
    nats a word or byte (of a target: nats). Beside it: every metric as lm-evaluation-harness aggregates it, equal to
    what its own command reports. Where a task has several filters the first is read.

    Prompts publish no span, for nobody knows what stands in them; where a prompt ends is told (see ``HeadscopeLM``). An
    evaluation's task is called ``lm_eval:NAME``. Data that are not on this machine are downloaded by the harness.

    Args:
        task: a name that lm-evaluation-harness knows, or a YAML file.
        include_path: a folder with YAML files of your own.
        measure: the metric whose values are the scores (None: the task's first).
        limit: documents of each task, from the first (None: all).
        num_fewshot: as of lm-evaluation-harness (None: the task's).
        batch_size: of requests of one document.
        chat: ask through the chat template.
    """

    task: str
    include_path: str | None = None
    measure: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1
    chat: bool = False

    name: ClassVar[str] = "lm_eval"
    metric: ClassVar[str] = "a metric of the task"
    unit: ClassVar[str] = "as the metric's"
    higher_is_better: ClassVar[bool | None] = None
    source: ClassVar[str] = "lm-evaluation-harness 0.4.13"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, limit=1, num_fewshot=0, batch_size=1)
        if find_spec("lm_eval") is None:
            raise HeadscopeError("lm-evaluation-harness is not installed: pip install 'headscope[evaluation]'")
        measures = list(self.tasks.values())
        chosen = self.measure or next(iter(measures[0].aggregation()))
        for name, task in self.tasks.items():
            if chosen not in task.aggregation():
                raise HeadscopeError(f"{name} has no metric {chosen!r}; it has {', '.join(task.aggregation())}")
        # what a score means differs from task to task of the harness
        named = Path(self.task).stem if Path(self.task).is_file() else self.task
        own = {"name": f"lm_eval:{named}", "metric": chosen}
        own |= {"higher_is_better": measures[0].higher_is_better().get(chosen)}
        for key, value in own.items():
            object.__setattr__(self, key, value)

    @cached_property
    def tasks(self) -> dict[str, Any]:
        """The harness's tasks by name."""
        from headscope.interventions.tasks.harness import read_tasks

        return read_tasks(self.task, self.include_path, self.num_fewshot)

    def runner(self, lm: LanguageModel) -> Runner:
        """The tasks on a model, made once for it."""
        from headscope.interventions.tasks.harness import Runner

        made = self.__dict__.get("_runner")
        if made is None or made.lm is not lm:
            made = self.__dict__["_runner"] = Runner(lm, self.tasks, self.limit, self.batch_size, self.chat)
        return made

    def parameters(self, lm: LanguageModel) -> dict[str, Any]:
        """The settings, and every request by its SHA-256."""
        asked = [json.dumps(request.args, default=str) for own in self.runner(lm).requests.values() for request in own]
        return super().parameters(lm) | {"requests_sha256": hash_texts(asked)}

    def trials(self, lm: LanguageModel) -> list[Trial]:
        """One trial a document: subtask and document, its number in it."""
        return [{"subtask": name, "document": number} for name, number in self.runner(lm).requests]

    def tokens(self, lm: LanguageModel, trial: Trial) -> tuple[int, int]:
        """The tokens of all requests of a document, and the most that they generate."""
        return self.runner(lm).size(trial["subtask"], trial["document"])

    def run(self, lm: LanguageModel, trial: Trial) -> dict[str, Any]:
        """Run one document.

        Returns:
            score, every metric that is a number of a document under its name, values (all metrics, as JSON) and
            response (what was generated; else the log-likelihood of every request, as JSON).
        """
        from headscope.interventions.tasks.harness import plain, score

        metrics, said = self.runner(lm).metrics(trial["subtask"], trial["document"])
        values = plain(metrics)
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, bool | int | float)}
        found = score(self.metric, values[self.metric])
        response = said[0] if isinstance(said[0], str) else json.dumps(plain(said))
        return {**numbers, "score": found, "values": json.dumps(values), "response": response}

    def summarise(self, trials: pd.DataFrame) -> dict[str, float]:
        """Every metric of every task as lm-evaluation-harness aggregates it."""
        found = {}
        for name, own in trials.groupby("subtask", sort=False):
            values = pd.DataFrame([json.loads(text) for text in own["values"]])
            for metric, aggregate in self.tasks[str(name)].aggregation().items():
                if metric in values:
                    key = metric if len(self.tasks) == 1 else f"{name}, {metric}"
                    found[key] = float(aggregate(list(values[metric])))
        return found
