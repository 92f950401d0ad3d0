"""Re-evaluation of an edited model, always beside no edit and layer-matched random heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.evaluation import Evaluation
from headscope.interp.results.headset import HeadSet
from headscope.interp.runs.estimate import announce
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.loop import opened, run_steps
from headscope.interp.runs.provenance import provenance
from headscope.interventions.applying import apply, size
from headscope.interventions.base import Composed, Intervention, moved, parts_of
from headscope.interventions.evaluation.summaries import summarised
from headscope.interventions.tasks import resolve
from headscope.interventions.tasks.base import Task

FILES = ("evaluation.json", "evaluation.parquet", "evaluation.trials.jsonl")
BASELINE, EDIT, CONTROL = "baseline", "intervention", "control"


@dataclass(frozen=True, eq=False)
class Condition:
    """One way to run the tasks: no edit, an intervention, or an intervention's random-head control ``of`` it."""

    name: str
    kind: str
    edits: tuple[Intervention, ...] = ()
    of: str = ""

    def describe(self) -> dict[str, Any]:
        """JSON-able settings."""
        return {"name": self.name, "kind": self.kind, "of": self.of, "edits": [e.describe() for e in self.edits]}


def evaluate(
    model: LanguageModel,
    tasks: str | Task | Sequence[str | Task] = ("needle",),
    interventions: Intervention | Sequence[Intervention | Sequence[Intervention]] = (),
    *,
    controls: int = 10,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run ``tasks`` without edit, with each intervention, and with its layer-matched random-head controls.

    Args:
        model: load_model's result, or what load_model takes.
        tasks: names from ``interventions.tasks.TASKS`` or task objects.
        interventions: each item is one condition; a composed one (``a + b``), or a sequence, is applied as one.
        controls: random head sets (seeds ``seed`` .. ``seed + controls - 1``) for every head-driven condition.
        out: folder for ``evaluation.json``, the per-trial table and the journal that makes the run resumable.

    Raises:
        HeadscopeError: unknown task, two tasks of one name, a head that does not exist, layers with too few heads for a
            control, or ``out`` holds a run with other settings or that goes on now.
    """
    model, chosen = load_model(model), resolve(tasks)
    items = [interventions] if isinstance(interventions, Intervention) else interventions
    conditions = plan(model, items, controls, seed)
    trials = {task.name: task.trials(model) for task in chosen}
    made = provenance(model, seed=seed, tasks={task.name: task.parameters(model) for task in chosen}, controls=controls)
    config: dict[str, Any] = {key: made[key] for key in ("model", "parameters", "seed")}
    config |= {"conditions": [c.describe() for c in conditions], "trials": trials}
    work = _schedule(chosen, conditions, trials)
    announce((task.tokens(model, trial) for task, _, trial in work), list(FILES) if out is not None else [])
    path = None if out is None else Path(out) / FILES[-1]

    def step(index: int) -> dict[str, Any]:
        task, condition, trial = work[index]
        with apply(model, *condition.edits):
            return task.run(model, trial)

    with opened(path, config) as journal:
        results = run_steps(journal, len(work), step, "evaluate", progress=progress)
    rows = [
        row({"task": task.name, "condition": c.name, "kind": c.kind, "of": c.of, "trial": number}, trial, result)
        for (task, c, trial), number, result in zip(work, _numbers(work), results, strict=True)
    ]
    made["conditions"] = config["conditions"]
    directions = {task.name: getattr(task, "higher_is_better", None) for task in chosen}
    result = Evaluation.from_rows(rows, {task.name: task.metric for task in chosen}, made, directions)
    result.details.extend(summarised(chosen, result.trials))
    if out is not None:
        result.save(out)
    return result


def plan(
    model: LanguageModel, interventions: Sequence[Intervention | Sequence[Intervention]], controls: int, seed: int
) -> list[Condition]:
    """The conditions: no edit first, then each intervention followed by its controls."""
    conditions = [Condition("no edit", BASELINE)]
    layers, heads = size(model)
    for item in interventions:
        edits = parts_of(item) if isinstance(item, Intervention) else parts_of(Composed(item))
        for edit in edits:
            edit.check(layers, heads)
        name = " + ".join(edit.name for edit in edits)
        if name in {condition.name for condition in conditions}:
            name = f"{name} #{len(conditions)}"
        conditions.append(Condition(name, EDIT, edits))
        if not any(edit.heads is not None for edit in edits):
            continue
        if controls < 1:
            raise HeadscopeError("a head intervention is reported beside random heads; set controls to at least 1")
        for number in range(controls):
            drawn = _control(edits, heads, seed + number)
            conditions.append(Condition(f"random for {name} (seed {seed + number})", CONTROL, drawn, of=name))
    return conditions


def _control(edits: tuple[Intervention, ...], heads: int, seed: int) -> tuple[Intervention, ...]:
    """The same edits on random heads: each head that any of them names is replaced by one of its layer that none names.

    A head that several edits name is replaced by the same head in all of them, and different heads by different ones.
    """
    named = HeadSet(tuple(dict.fromkeys(head for edit in edits for head in edit.heads or ())))
    ordered = [(layer, head) for layer, mine in sorted(named.by_layer().items()) for head in mine]
    instead = dict(zip(ordered, named.matched_random(heads, seed), strict=True))
    return tuple(moved(edit, instead, f"random (seed {seed})") for edit in edits)


def _schedule(
    tasks: list[Task], conditions: list[Condition], trials: dict[str, list[Trial]]
) -> list[tuple[Task, Condition, Trial]]:
    return [(task, condition, trial) for task in tasks for condition in conditions for trial in trials[task.name]]


def _numbers(work: list[tuple[Task, Condition, Trial]]) -> list[int]:
    seen: dict[tuple[str, str], int] = {}
    numbers = []
    for task, condition, _ in work:
        key = (task.name, condition.name)
        numbers.append(seen.get(key, 0))
        seen[key] = numbers[-1] + 1
    return numbers


def row(own: dict[str, Any], trial: Trial, result: dict[str, Any]) -> dict[str, Any]:
    """A row of an evaluation's table: ``own``, which no key of a task's replaces, the trial's scalars, its result."""
    scalars = {key: value for key, value in trial.items() if isinstance(value, str | int | float | bool)}
    return {**own, **scalars, **result, **own}
