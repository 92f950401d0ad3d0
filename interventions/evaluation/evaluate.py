"""Re-evaluation of an edited model, always beside no edit and random heads or vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.evaluation import RANDOM_CHOICE, RANDOM_HEADS, RANDOM_VECTORS, Evaluation
from headscope.interp.results.headset import HeadSet
from headscope.interp.runs.actors import Ray, engine_of
from headscope.interp.runs.elsewhere import maker
from headscope.interp.runs.estimate import announce
from headscope.interp.runs.files import folder_of
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.loop import opened, run_steps
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import Loadable
from headscope.interventions.applying import size
from headscope.interventions.base import Composed, Intervention, moved, parts_of
from headscope.interventions.evaluation.batches import Batches
from headscope.interventions.evaluation.summaries import summarised
from headscope.interventions.evaluation.workers import run_elsewhere
from headscope.interventions.tasks import resolve
from headscope.interventions.tasks.base import Task, prepares

FILES = ("evaluation.json", "evaluation.parquet", "evaluation.trials.jsonl")
BASELINE, EDIT, CONTROL = "baseline", "intervention", "control"


@dataclass(frozen=True, eq=False)
class Condition:
    """One way to run the tasks: no edit, an intervention, or a random control ``of`` one, with which ``control``."""

    name: str
    kind: str
    edits: tuple[Intervention, ...] = ()
    of: str = ""
    control: str = ""

    def describe(self) -> dict[str, Any]:
        """JSON-able settings."""
        return {**self.labels(), "name": self.name, "edits": [e.describe() for e in self.edits]}

    def labels(self) -> dict[str, str]:
        """Its columns in a table of trials, beside its name."""
        return {"kind": self.kind, "of": self.of, "control": self.control}


def evaluate(
    model: Loadable,
    tasks: str | Task | Sequence[str | Task] = ("needle",),
    interventions: Intervention | Sequence[Intervention | Sequence[Intervention]] = (),
    *,
    controls: int = 10,
    vectors: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    engine: Ray | str | None = None,
) -> Evaluation:
    """Run ``tasks`` without edit, with each intervention, and with its random controls.

    Controls are the same edit on random heads of the same layers; of an edit that adds vectors to what heads write
    (``AddToHeads``, the ``v`` of ``AffineHeads``), the same heads with random directions of the same norms; and of one
    that chooses heads or tokens for each prompt (``ReinforceHeads``, ``PruneTokens``), as many random ones. They ask
    whether these heads, directions or tokens matter.

    Trials of a task with ``together`` above 1 run so many at a time, as one batch.

    Args:
        model: load_model's result, or what load_model takes.
        tasks: names from ``interventions.tasks.TASKS`` or task objects.
        interventions: each item is one condition; a composed one (``a + b``), or a sequence, is applied as one.
        controls: random head sets (seeds ``seed`` .. ``seed + controls - 1``) for every head-driven condition, and
            random choices for every one that chooses.
        vectors: sets of random vectors for every condition that adds vectors (None: as many as ``controls``).
        out: folder for ``evaluation.json``, the per-trial table and the journal that makes the run resumable.
        engine: ``"ray"`` or a ``headscope.interp.runs.actors.Ray``: the trials run in actors, each with a model of its
            own on which it puts each condition's edits, and this process writes the journal; None: here.

    Raises:
        HeadscopeError: unknown task, two tasks of one name, a head that does not exist, layers with too few heads for a
            control, or ``out`` holds a run with other settings or that goes on now; with ``engine``, an edit that is in
            force already, which would stay on this process's model.
    """
    given, actors, out = model, engine_of(engine), folder_of(out)
    model, chosen = load_model(model), resolve(tasks)
    items = [interventions] if isinstance(interventions, Intervention) else interventions
    conditions = plan(model, items, controls, seed, vectors)
    trials = {task.name: task.trials(model) for task in chosen}
    settings = {task.name: task.parameters(model) for task in chosen}
    made = provenance(model, seed=seed, tasks=settings, controls=controls, vectors=vectors)
    config: dict[str, Any] = {key: made[key] for key in ("model", "parameters", "seed")}
    config |= {"conditions": [c.describe() for c in conditions], "trials": trials}
    work = _schedule(chosen, conditions, trials)
    passes = [task.tokens(model, trial) for task, _, trial in work]
    passes += [task.tokens(model, trial) for task in chosen if prepares(task) for trial in trials[task.name]]
    announce(passes, list(FILES) if out is not None else [])
    path = journal_in(out)
    step = Batches(model, work)
    with opened(path, config) as journal:
        if actors is not None:
            run_elsewhere(journal, work, actors, maker(given, model), progress=progress)
        results = run_steps(journal, len(work), step, "evaluate", progress=progress)
    rows = [
        row({"task": task.name, "condition": c.name, **c.labels(), "trial": number}, trial, result)
        for (task, c, trial), number, result in zip(work, _numbers(work), results, strict=True)
    ]
    made["conditions"] = config["conditions"]
    directions = {task.name: getattr(task, "higher_is_better", None) for task in chosen}
    result = Evaluation.from_rows(rows, {task.name: task.metric for task in chosen}, made, directions)
    result.details.extend(summarised(chosen, result.trials))
    if out is not None:
        result.save(out)
    return result


def journal_in(out: Path | None) -> Path | None:
    """Where the journal of a run into the folder ``out`` stands.

    Raises:
        HeadscopeError: results without a journal are there, which nobody could tell from another run's.
    """
    path = None if out is None else out / FILES[-1]
    if path is not None and not path.exists() and path.with_name(FILES[0]).exists():
        raise HeadscopeError(
            f"{path.with_name(FILES[0])} is there without its journal and would be lost: name another out"
        )
    return path


def plan(
    model: LanguageModel,
    interventions: Sequence[Intervention | Sequence[Intervention]],
    controls: int,
    seed: int,
    vectors: int | None = None,
) -> list[Condition]:
    """The conditions: no edit first, then each intervention followed by its controls, random heads before vectors."""
    conditions = [Condition("no edit", BASELINE)]
    layers, heads = size(model)
    drawn = controls if vectors is None else vectors
    for item in interventions:
        edits = parts_of(item) if isinstance(item, Intervention) else parts_of(Composed(item))
        for edit in edits:
            edit.check(layers, heads)
        name = " + ".join(edit.name for edit in edits)
        same = [one for one in conditions if one.kind == EDIT and one.name.partition(" #")[0] == name]
        if same:
            name = f"{name} #{len(same) + 1}"
        conditions.append(Condition(name, EDIT, edits))
        conditions += _controls(name, edits, heads, range(seed, seed + controls), range(seed, seed + drawn))
    return conditions


def _controls(
    name: str, edits: tuple[Intervention, ...], heads: int, of_heads: Sequence[int], of_vectors: Sequence[int]
) -> list[Condition]:
    """The controls of one condition: with random heads for the seeds ``of_heads``, where it has heads, and with random
    vectors for those ``of_vectors``, where it adds some; random choices as many as heads, where it chooses.

    Raises:
        HeadscopeError: none is left of a condition that could have some.
    """
    of_choices = of_heads if any(edit.chooses for edit in edits) else ()
    of_heads = of_heads if any(edit.heads is not None for edit in edits) else ()
    of_vectors = of_vectors if any(edit.adds_vectors for edit in edits) else ()
    chosen = any(edit.heads is not None or edit.chooses for edit in edits)
    if not of_heads and not of_vectors and not of_choices and chosen:
        raise HeadscopeError("a head intervention is reported beside random ones; set controls to at least 1")
    found = []
    for seed in of_heads:
        moved_there = _random_heads(edits, heads, seed)
        found.append(Condition(f"random for {name} (seed {seed})", CONTROL, moved_there, name, RANDOM_HEADS))
    for seed in of_vectors:
        rng = np.random.default_rng(seed)
        turned = tuple(edit.with_random_vectors(rng) for edit in edits)
        found.append(Condition(f"random vectors for {name} (seed {seed})", CONTROL, turned, name, RANDOM_VECTORS))
    for seed in of_choices:
        drawn = tuple(edit.with_random_choice(seed) for edit in edits)
        found.append(Condition(f"random choice for {name} (seed {seed})", CONTROL, drawn, name, RANDOM_CHOICE))
    return found


def _random_heads(edits: tuple[Intervention, ...], heads: int, seed: int) -> tuple[Intervention, ...]:
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
    """Condition by condition; of a task that prepares its trials, trial by trial, so that one is kept at a time."""
    work = []
    for task in tasks:
        own = [(task, condition, trial) for condition in conditions for trial in trials[task.name]]
        if prepares(task):
            own = [(task, condition, trial) for trial in trials[task.name] for condition in conditions]
        work += own
    return work


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
