"""Abrupt in-context classification: when a network reads its context, and when its weights (Reddy 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from headscope.interp.laboratory.abrupt_icl.data import Batch, Law, World
from headscope.interp.laboratory.abrupt_icl.induction import fitted
from headscope.interp.laboratory.abrupt_icl.measures import accuracy, jump, progress
from headscope.interp.laboratory.abrupt_icl.model import Classifier
from headscope.interp.laboratory.abrupt_icl.verdicts import noisy, verdicts
from headscope.interp.laboratory.experiment import Bench, Experiment
from headscope.interp.laboratory.training import generator
from headscope.interp.laboratory.watch import Watch
from headscope.interp.registry import check_counts
from headscope.interp.results.findings import Claim, Numbers

MEASURES = ("ila1", "tla2", "tila2", "cla", "ic")


@dataclass(frozen=True, kw_only=True)
class AbruptICL(Experiment):
    """Reddy's two attention layers on sequences of items and labels: accuracy in context (``ic``: novel classes;
    ``ic2``: known classes under other labels) and in weights (``iw``: the target is not in the context), while it
    learns, over burstiness, number of classes and noise of items; the jump of ``ic``; and a two-parameter induction
    head fitted to the progress measures.

    The defaults are a smaller problem that jumps within a minute or two of one core [OURS]: 4 pairs (paper 8), 31
    dimensions (63), 17 positions (65), a rate of 0.1 (0.01), 2,500 steps (150,000), tests of 500 sequences (10,000).
    What is claimed of these settings is a direction, not the paper's figure. The jump of ``ic`` is taken from what
    choosing among the labels of the context gives, which is learned first [OURS]. With ``burst`` 0 the target is seldom
    in the context, and ``ic2`` says nothing. Progress is measured on novel classes, where weights can say nothing
    [OURS].

    Args:
        classes: K of the base setting.
        burst: B of the base setting.
        noise: eps of the base setting.
        skew: exponent of the classes' frequencies; acts on sequences that are not bursty.
        bursty: share of bursty sequences.
        bursts: further B, at the base's K and noise.
        few: further K, at the base's B and noise.
        noises: further eps, at the largest of ``few``.
        pairs: N of a sequence.
        labels: L.
        dimensions: of an item.
        positions: one-hot places.
        steps: of training, each model.
        batch: sequences a step.
        rate: of plain gradient descent.
        decay: share of every weight that a step takes away, whatever the rate.
        tests: sequences of each test.
        every: steps between two points of a curve.
    """

    name: ClassVar[str] = "abrupt_icl"
    source: ClassVar[str] = "arXiv 2312.03002"

    classes: int = 512
    burst: int = 1
    noise: float = 0.1
    skew: float = 0.0
    bursty: float = 1.0
    bursts: tuple[int, ...] = (0, 2)
    few: tuple[int, ...] = (32, 128)
    noises: tuple[float, ...] = (0.7,)
    pairs: int = 4
    labels: int = 32
    dimensions: int = 31
    positions: int = 17
    steps: int = 2_500
    batch: int = 128
    rate: float = 0.1
    decay: float = 1e-6
    tests: int = 500
    every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(1, steps=self.steps, batch=self.batch, tests=self.tests, every=self.every)
        self.grid()  # refuses what does not go together before anything is trained

    def quick(self) -> Self:
        return replace(self, burst=2, bursts=(), few=(32,), noises=(), labels=16, positions=9, steps=1_000)

    def grid(self) -> dict[str, Law]:
        """The settings that are trained, by label: ``base``, ``B2``, ``K32``, ``K128_eps0.7``."""
        base = Law(
            classes=self.classes,
            labels=self.labels,
            pairs=self.pairs,
            burst=self.burst,
            noise=self.noise,
            skew=self.skew,
            bursty=self.bursty,
            positions=self.positions,
            dimensions=self.dimensions,
        )
        most = max(self.few, default=self.classes)
        return (
            {"base": base}
            | {f"B{burst}": replace(base, burst=burst) for burst in self.bursts}
            | {f"K{classes}": replace(base, classes=classes) for classes in self.few}
            | {noisy(self.few, self.classes, noise): replace(base, classes=most, noise=noise) for noise in self.noises}
        )

    def run(self, bench: Bench) -> Mapping[str, float]:
        numbers: dict[str, float] = {}
        for label, law in self.grid().items():
            rows, same = self._trained(bench, label, law)
            steps = [row["step"] for row in rows]
            numbers |= {f"{name}_{label}": rows[-1][name] for name in ("train", "ic", "ic2", "iw")}
            for name in MEASURES:
                floor = law.copies / law.pairs if name == "ic" else 0.0  # what choosing among the labels shown gives
                rise = jump(steps, [row[name] for row in rows], floor)
                numbers |= {f"{name}_{what}_{label}": value for what, value in rise.items()}
            head = fitted(rows, same)
            for name in ("beta", "alpha"):
                numbers[f"{name}_{label}"] = head[name][-1]
            numbers[f"fit_error_{label}"] = float(np.sqrt(np.mean(np.square(head["error"]))))
            numbers[f"fit_worst_{label}"] = max(head["error"])
            for row, beta, alpha, error in zip(rows, *head.values(), strict=True):
                row |= {"beta": beta, "alpha": alpha, "fit_error": error}
        return numbers

    def claims(self, numbers: Numbers) -> list[Claim]:
        return verdicts(numbers, self.bursts, self.few, self.noises, self.grid()["base"])

    def _trained(self, bench: Bench, label: str, law: Law) -> tuple[list[dict[str, Any]], Tensor]:
        """The curve of one setting, and the pairs of the test in context that hold the target's class."""
        world = World(law, bench.seed, bench.device)
        torch.manual_seed(bench.seed)  # each model begins as it would alone
        model = Classifier(law).to(bench.device)
        tests = self._tests(law, world, bench)

        def loss(model: Any, step: int) -> Tensor:
            batch = world.draw(law, self.batch, generator(bench.seed, step, bench.device))
            return cross_entropy(model(batch.tokens), batch.label)

        def measured(model: Any) -> dict[str, float]:
            return {name: accuracy(model, test) for name, test in tests.items()} | progress(model, tests["ic"])

        # the authors' step: p <- (1 - decay) p - rate * gradient
        descent = torch.optim.SGD(model.parameters(), self.rate, weight_decay=self.decay / self.rate)
        watch = Watch(every=self.every, numbers=measured)
        return bench.train(label, model, loss, descent, steps=self.steps, watch=watch), tests["ic"].same

    def _tests(self, law: Law, world: World, bench: Bench) -> dict[str, Batch]:
        """The paper's four tests, fixed: sequences as in training, novel classes, flipped labels, no context."""

        def drawn(which: int, law: Law, *, flipped: bool = False) -> Batch:
            return world.draw(law, self.tests, generator(bench.seed, -2 - which, bench.device), flipped=flipped)

        return {
            "train": drawn(0, law),
            "ic": drawn(1, law.only_novel()),
            "ic2": drawn(2, replace(law, bursty=1.0, novel=0.0), flipped=True),
            "iw": drawn(3, law.only_known()),
        }
