"""Attention variants on one recall task: loss, and how much their heads look at what is of no use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.heads.position.matching import match_heads, run_distances
from headscope.interp.laboratory.decoder import Decoder, Shape
from headscope.interp.laboratory.experiment import Bench, Experiment
from headscope.interp.laboratory.recall.measures import measured, recall_loss
from headscope.interp.laboratory.recall.task import Recall
from headscope.interp.laboratory.training import generator
from headscope.interp.laboratory.variants import VARIANTS
from headscope.interp.laboratory.watch import Watch
from headscope.interp.results.findings import Claim, Numbers
from headscope.interp.tracing.reference_run import ReferenceRun, keep_attention
from headscope.kernels.masks import Mask

PROBE = -1  # the step whose draws are the held-out texts
DIFFERENCES = ("differential", "grouped_differential", "shared_differential")


@dataclass(frozen=True, kw_only=True)
class Variants(Experiment):
    """Every attention variant of the bench trained alike on ``Recall``, where the one relevant token of each answer is
    known: loss, accuracy, noise (mass off that token), sink mass and entropy of the heads.

    Beside them softmax attention with other positions (NoPE, ALiBi, RoPE), trained on one length and asked at others:
    the same pairs among more blanks, accuracy, noise and mean distance of the heads (Kazemnejad et al. 2023, arXiv
    2305.19466, whose tasks are others); and, as there, how far the heads of any two of them are apart on the same texts
    (``none-rope head_distance``): Jensen-Shannon divergence in nats, of the heads of a layer that fit each other best,
    and ``unmatched`` the mean over all pairs of its heads (``heads.position.matching``).

    Sources are the variants' own; no paper has this task [OURS], whose claims are the papers' directions. A variant
    that learns slowly at this learning rate may do well at another. What it does not show: what a variant does in
    language; and masses of patterns are no claim about what is written (a value may be 0).

    Args:
        variants: of ``headscope.interp.laboratory.variants``, with commas between.
        positions: of softmax attention, for lengths.
        times: test lengths, as multiples of the trained one.
        keys, values, blanks, queries: of ``Recall``; there are as many pairs as keys.
        layers, heads, width: of the model.
        batch, steps, rate, decay: of AdamW.
        every: steps between two measurements.
        samples: held-out texts.
    """

    name: ClassVar[str] = "variants"
    source: ClassVar[str] = "arXiv 2305.19466, and each variant's own"

    variants: str = ",".join(VARIANTS)
    positions: str = "rope,alibi,none"
    times: str = "1,2,4"
    keys: int = 16
    values: int = 8
    blanks: int = 8
    queries: int = 8
    layers: int = 2
    heads: int = 4
    width: int = 64
    batch: int = 32
    steps: int = 1000
    rate: float = 5e-3
    decay: float = 0.01
    every: int = 250
    samples: int = 128

    def quick(self) -> Self:
        return replace(self, variants="softmax,differential,no_mixing", positions="none", steps=250, samples=32)

    @property
    def task(self) -> Recall:
        """What is trained."""
        return Recall(self.keys, self.values, self.keys, self.blanks, self.queries)

    def run(self, bench: Bench) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for name in self.variants.split(","):
            model, last = self.trained(bench, name, "rope")
            found |= {f"{name} {number}": value for number, value in last.items() if number != "step"}
        runs: dict[str, ReferenceRun] = {}
        for positions in filter(None, self.positions.split(",")):
            model, _ = self.trained(bench, "softmax", positions, label=f"positions {positions}")
            with keep_attention(model) as runs[positions], torch.no_grad():
                model(self.drawn(self.task, bench, self.samples, PROBE)[0])
            for times in map(int, self.times.split(",")):
                task = replace(self.task, blanks=times * self.task.length - self.keys - self.queries)
                held = self.drawn(task, bench, self.samples, PROBE)
                for number in ("accuracy", "noise", "distance"):
                    found[f"{positions} x{times} {number}"] = measured(model, task, held)[number]
        for one, other in combinations(sorted(runs), 2):
            matched = match_heads(run_distances(runs[one], runs[other]))
            found[f"{one}-{other} head_distance"] = float(matched["distance"].mean())
            found[f"{one}-{other} head_distance unmatched"] = float(matched["unmatched"].mean())
        return found

    def trained(
        self, bench: Bench, name: str, positions: str, label: str | None = None
    ) -> tuple[Decoder, dict[str, Any]]:
        """A model of a variant, and its last measurements."""
        torch.manual_seed(bench.seed)
        task, mask = self.task, Mask.full() if VARIANTS[name].both_ways else Mask.causal()
        shape = Shape(
            vocabulary=task.vocabulary,
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            hidden=2 * self.width,
            context=task.length,
            positions=positions,
            mask=mask,
        )
        model = Decoder(shape, VARIANTS[name])
        adam = torch.optim.AdamW(model.parameters(), self.rate, weight_decay=self.decay, fused=True)
        held = self.drawn(task, bench, self.samples, PROBE)
        rows = bench.train(
            label or name,
            model,
            lambda model, step: recall_loss(model, task, self.drawn(task, bench, self.batch, step)),
            adam,
            steps=self.steps,
            watch=Watch(every=self.every, numbers=lambda model: measured(model, task, held)),
            clip=1.0,
            save_every=max(1, self.steps - 1),  # a killed run does not train again what had come to its end
        )
        return model, rows[-1]

    def drawn(self, task: Recall, bench: Bench, count: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The texts of a step, on the bench's device."""
        ids, values, at = task.draw(count, generator(bench.seed, step))
        return ids.to(bench.device), values.to(bench.device), at.to(bench.device)

    def claims(self, numbers: Numbers) -> list[Claim]:
        found: list[Claim] = []

        def claim(
            says: str, paper: str, names: tuple[str, str], held: Callable[[NDArray[Any], NDArray[Any]], Any]
        ) -> None:
            if all(name in numbers for name in names):
                one, other = (numbers[name] for name in names)
                ours = f"{shown(one)} beside {shown(other)}"
                found.append(Claim(says, paper, ours, bool(np.all(held(one, other)))))

        for name in DIFFERENCES:
            pair = (f"{name} noise_difference", "softmax noise")
            claim(f"{name}: less noise in the difference than in softmax's pattern", "less", pair, np.less)
        for name in ("selective", "softplus"):
            claim(f"{name}: a sharper pattern", "less", (f"{name} entropy", "softmax entropy"), np.less)
        for name in ("affine", "landmark", "core_context"):
            pair = (f"{name} accuracy", "softmax accuracy")
            claim(f"{name}: recalls as softmax does", "as good", pair, lambda x, y: x >= y - 0.05)
        for name in ("no_mixing", "random_scores", "fixed_scores"):
            pair = (f"{name} accuracy", "softmax accuracy")
            claim(f"{name}: cannot recall (chance {1 / self.values:.3f})", "", pair, lambda x, y: x < 2 / self.values)
        far = max(map(int, self.times.split(",")))
        for other in ("rope", "alibi"):
            pair = (f"none x{far} accuracy", f"{other} x{far} accuracy")
            claim(f"NoPE goes further than {other}: accuracy at {far} times the length", "further", pair, np.greater)
        return found


def shown(x: NDArray[Any]) -> str:
    """The mean of seeds, and the smallest and largest."""
    return f"{x.mean():.3f} [{x.min():.3f}, {x.max():.3f}]"
