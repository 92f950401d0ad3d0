"""An experiment: small models, trained under one claim of a paper, and what is measured of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headscope.interp.errors import HeadscopeError
from headscope.interp.laboratory.training import train
from headscope.interp.laboratory.watch import Watch
from headscope.interp.registry import check_numbers
from headscope.interp.results.findings import Claim, Findings, Numbers, numbers_of
from headscope.interp.runs.files import folder_of
from headscope.interp.runs.journal import Journal
from headscope.interp.runs.measured import hardware
from headscope.interp.runs.provenance import provenance


@dataclass(frozen=True, eq=False)
class Bench:
    """Where one seed of an experiment runs. ``curves`` holds what was recorded of each model it trained, ``settings``
    are the experiment's, which its checkpoints keep."""

    seed: int
    device: str
    folder: Path | None
    curves: dict[str, list[dict[str, Any]]]
    settings: Mapping[str, Any]

    def train(
        self,
        label: str,
        model: nn.Module,
        loss: Callable[[Any, int], Tensor],
        optimizer: Optimizer,
        *,
        steps: int,
        watch: Watch,
        **more: Any,
    ) -> list[dict[str, Any]]:
        """``train`` under a label of its own; further arguments are its."""
        folder = None if self.folder is None else self.folder / label
        rows = train(model, loss, optimizer, steps=steps, watch=watch, folder=folder, device=self.device,
                     settings={"seed": self.seed, **self.settings}, **more)  # fmt: skip
        self.curves[label] = rows
        return rows


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Base of the experiments. A subclass writes ``quick``, ``run`` and ``claims``; its fields are its settings.

    Class variables: ``name``, as in the registry; ``source``.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_numbers(self, self.name)

    def quick(self) -> Self:
        """The same with sizes and steps that take a minute of one core: mechanics and directions, no figures."""
        raise NotImplementedError

    def run(self, bench: Bench) -> Mapping[str, float]:
        """Train and measure with ``bench.seed``; the numbers by name."""
        raise NotImplementedError

    def claims(self, numbers: Numbers) -> list[Claim]:
        """What held, from the numbers of every seed."""
        raise NotImplementedError


def run_experiment(
    experiment: Experiment,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    out: str | Path | None = None,
    device: str | None = None,
    command: str = "",
) -> Findings:
    """Run an experiment under every seed, and judge its claims.

    With ``out``, finished seeds and checkpoints of the running one are kept there, and running again goes on from them;
    ``findings.json`` is the result.

    Args:
        experiment: with its settings.
        seeds: of everything that is drawn; three are the least that show a spread.
        out: a folder.
        device: ``"cpu"``, ``"cuda"``; None takes a GPU where there is one.
        command: what made it, for the record.

    Raises:
        HeadscopeError: no seeds, one twice, or a folder that holds another run.
    """
    folder = folder_of(out)
    if not seeds or len(set(seeds)) != len(seeds):
        raise HeadscopeError(f"give different seeds, at least one, not {list(seeds)}")
    if device not in (None, "cpu", "cuda"):
        raise HeadscopeError(f"the laboratory runs on cpu or cuda, not {device!r}: CUDA_VISIBLE_DEVICES chooses a card")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = json.loads(json.dumps(asdict(experiment)))
    config = {"experiment": experiment.name, "settings": settings, "device": place}
    journal = Journal(None if folder is None else folder / "lab.jsonl", config)
    for seed in seeds:
        if seed not in journal.entries:
            journal.add(seed, _one(experiment, seed, place, folder, settings))
    outcomes = [journal.entries[seed] for seed in seeds]
    made = provenance(None, command=command) | {"device": hardware(place)}
    claims = experiment.claims(numbers_of(outcomes))
    found = Findings(experiment.name, settings, tuple(seeds), outcomes, claims, made)
    if folder is not None:
        found.save(folder / "findings.json")
    return found


def _one(
    experiment: Experiment, seed: int, device: str, folder: Path | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    start = time.perf_counter()
    torch.manual_seed(seed)
    bench = Bench(seed, device, None if folder is None else folder / f"seed-{seed}", {}, settings)
    numbers = {name: float(value) for name, value in experiment.run(bench).items()}
    return {"numbers": numbers, "curves": bench.curves, "seconds": round(time.perf_counter() - start, 1)}
