"""A circuit from prompts to numbers, in steps that a killed run does not repeat: found, measured, evaluated, saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.files import folder_of, write_atomically
from headscope.interp.runs.loop import opened, run_steps
from headscope.interp.runs.provenance import describe, fingerprint, hash_texts, provenance
from headscope.interp.runs.sealed import sealed
from headscope.probes.circuits.ablation import Ablation
from headscope.probes.circuits.circuit import Circuit
from headscope.probes.circuits.coloured import coloured_objects
from headscope.probes.circuits.evaluation import evaluate_circuit, faithfulness_curve
from headscope.probes.circuits.figure import circuit_figure
from headscope.probes.circuits.finding import find_circuit, measure_edges
from headscope.probes.circuits.ioi import ioi
from headscope.probes.patching.attribution import attribution_patching
from headscope.probes.patching.pairs import Pairs

TASKS: dict[str, Callable[..., Pairs]] = {"ioi": ioi, "coloured_objects": coloured_objects}
SUBSETS = 10  # halves of the circuit, of which ``searched`` are searched
LEAST = {"count": 1, "size": 1, "budget": 1, "randoms": 0, "searched": 0, "seed": 0}  # whole numbers
METHODS = ("attribution", "path")


@dataclass(frozen=True, eq=False)
class CircuitStudy:
    """The circuit, its ``evaluation`` (``CircuitEvaluation.document``) on pairs that it was not found on, and the
    faithfulness ``curve`` on them of the heads that attribution ranks highest."""

    circuit: Circuit
    evaluation: dict[str, Any]
    curve: pd.DataFrame


def study_circuit(
    lm: LanguageModel,
    task: str = "ioi",
    out: str | Path | None = None,
    *,
    count: int = 48,
    size: int = 20,
    method: Literal["attribution", "path"] = "attribution",
    mlps: bool = False,
    budget: int = 2000,
    edges: bool = True,
    ablation: Ablation = "mean",
    randoms: int = 20,
    searched: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> CircuitStudy:
    """Find a circuit on ``count`` pairs and evaluate it on ``count`` others (the next seed).

    Args:
        lm: load_model's result, or what load_model takes.
        task: ``ioi`` or ``coloured_objects``.
        out: folder for ``circuit.json``, ``evaluation.json`` and ``circuit.html``; a killed run resumes from it, a step
            (finding, edges, evaluation, curve) at a time, a search by paths a receiver at a time (``search.jsonl``).
        size, method, mlps, budget: as in ``find_circuit``.
        edges: measure those among the circuit's heads (by attribution it has none otherwise).
        ablation, randoms, searched: as in ``evaluate_circuit``.

    Raises:
        HeadscopeError: a setting that is none, before anything runs or is written; as those functions; or a folder of
            another run.
    """
    settings: dict[str, Any] = {
        "task": task,
        "count": count,
        "size": size,
        "method": method,
        "mlps": mlps,
        "budget": budget,
        "edges": edges,
        "ablation": ablation,
        "randoms": randoms,
        "searched": searched,
        "seed": seed,
    }
    _check(settings)
    folder, lm = folder_of(out), load_model(lm)
    every = lm.info.layers * (lm.info.heads + mlps)
    if size > every:
        raise HeadscopeError(f"size={size}: choose 1 to {every} {'nodes' if mlps else 'heads'} of {lm.name}")
    pairs, others = (TASKS[task](lm, count, seed=s) for s in (seed, seed + 1))
    config = {**settings, "model": lm.name, "weights": fingerprint(lm.inner)}
    config |= {"pairs": [[hash_texts(x.texts), describe([x.answers, x.others, x.groups])] for x in (pairs, others)]}
    held: list[dict[str, Any]] = []

    def find() -> dict[str, Any]:
        search = None if folder is None else folder / "search.jsonl"
        return find_circuit(lm, pairs, size, method, mlps=mlps, budget=budget, out=search, progress=progress).document()

    def measure() -> dict[str, Any]:
        found = Circuit.of(held[0])
        return (measure_edges(lm, pairs, found, progress=progress) if edges else found).document()

    def evaluate() -> dict[str, Any]:
        found = Circuit.of(held[1])
        return evaluate_circuit(
            lm,
            found,
            others,
            ablation=ablation,
            randoms=randoms,
            subsets=SUBSETS,
            searched=searched,
            seed=seed,
            progress=progress,
        ).document()

    def curve() -> dict[str, Any]:
        scores = attribution_patching(lm, pairs, progress=progress).scores
        sizes = [n for n in (1, 2, 5, 10, 20, 40, 80, 160, 320) if n < scores.mean.size] + [int((scores.n > 0).sum())]
        found = faithfulness_curve(
            lm, scores, others, sizes, ablation=ablation, randoms=5, seed=seed, progress=progress
        )
        return {"rows": found.to_dict("records")}

    steps = (find, measure, evaluate, curve)

    def step(index: int) -> dict[str, Any]:
        held[:] = [journal.entries[i] for i in range(index)]
        return steps[index]()

    with opened(None if folder is None else folder / "circuit.jsonl", config) as journal:
        done = run_steps(journal, len(steps), step, "circuit", progress=False)
    study = CircuitStudy(Circuit.of(done[1]), done[2], pd.DataFrame(done[3]["rows"]))
    if folder is not None:
        study.circuit.save(folder / "circuit.json")
        made = {"evaluation": done[2], "curve": done[3]["rows"], "provenance": provenance(lm, **settings)}
        write_atomically(folder / "evaluation.json", sealed(json.loads(json.dumps(made, default=str))))
        page = circuit_figure(study.circuit, f"{task}: {lm.name}").to_html(include_plotlyjs="cdn")
        write_atomically(folder / "circuit.html", page.encode())
    return study


def _check(settings: dict[str, Any]) -> None:
    """Refuse what no step could take: some are asked first when others have run for long."""
    for name, known in (("task", tuple(TASKS)), ("method", METHODS), ("ablation", get_args(Ablation))):
        if settings[name] not in known:
            raise HeadscopeError(f"no {name} {settings[name]!r}: name one of {', '.join(known)}")
    for name, least in LEAST.items():
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise HeadscopeError(f"{name}={value!r}: give a whole number, at least {least}")
    for name in ("mlps", "edges"):
        if not isinstance(settings[name], bool):
            raise HeadscopeError(f"{name}={settings[name]!r}: say true or false")
    if settings["searched"] > SUBSETS:
        raise HeadscopeError(f"searched={settings['searched']}: search among 0 to {SUBSETS} halves of the circuit")
