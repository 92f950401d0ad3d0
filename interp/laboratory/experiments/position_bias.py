"""Emergence of position bias: which of two equal items a small network believes, by its mask and encoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headscope.interp.errors import HeadscopeError
from headscope.interp.laboratory.experiment import Bench, Experiment
from headscope.interp.laboratory.position_bias.data import PAIRS_OF_PLACES, Shape, World
from headscope.interp.laboratory.position_bias.measures import TABLE, Row, gaps, rollout
from headscope.interp.laboratory.position_bias.model import Network
from headscope.interp.laboratory.position_bias.theory import closed_pattern, cumulative
from headscope.interp.laboratory.training import generator
from headscope.interp.laboratory.watch import Watch
from headscope.interp.results.findings import Claim, Numbers

NAMES = tuple(f"{a}_{b}" for a, b in PAIRS_OF_PLACES)
SHALLOW = tuple(name for name, row in TABLE.items() if row.depth == 2 and row.paper is not None)
DEEPER = {"causal": "+0.077, +0.106", "decay": "-0.073, +0.014", "rope": "-0.002, +0.044"}  # first-last


@dataclass(frozen=True, kw_only=True)
class PositionBias(Experiment):
    """Wu et al. 2025 (arXiv 2502.01951): item-label pairs, a query, and attention layers of one head.

    Two places hold the same new item under different labels, and only one is right. ``ROW/first_last`` is the accuracy
    with the first right less that with the last right, and so on: what position alone decides. ``ROW/first`` and
    ``ROW/last`` are the query's rollout on the two pairs (its own item counts for neither), ``ROW/first_closed`` what
    the mask gives where all scores are 0. Rollout shows what attention lets through, not what the MLP makes of it.

    [OURS] 4,000 steps of the networks of two layers, which take a core some minutes; the paper trains 100,000 (its
    code's default is 50,000), and accuracy still grows. Networks of six layers learn nothing in the first 1,000 steps:
    name them in ``rows`` where there is a GPU. The paper's tests draw 2,048 new classes a question and use two; here
    two are drawn. Sequences are drawn in batches, not indexed in a data set of 64 million. Nothing else differs.

    Args:
        rows: networks of the paper's tables, by name, or ``window_2``, ``prefix_2``, ``sinusoidal_2``, of
            which it has no figures (``headscope.interp.laboratory.position_bias.measures.TABLE``).
        steps: of training each.
        batch: sequences a step.
        rate: of AdamW, with weight decay 1e-6.
        questions: of each of the six tests, at the end.
        pairs, copies, width, noise: of a sequence, see ``Shape``.
        classes: seen in training (K).
        labels: L.
        window, prefix, slope: of the masks of that name; the paper's slope is 0.223 = -log 0.8.
    """

    name: ClassVar[str] = "position_bias"
    source: ClassVar[str] = "arXiv 2502.01951"

    rows: tuple[str, ...] = SHALLOW
    steps: int = 4000
    batch: int = 128
    rate: float = 1e-3
    questions: int = 10_000
    pairs: int = 8
    copies: int = 4
    width: int = 64
    noise: float = 0.75
    classes: int = 2048
    labels: int = 32
    window: int = 5
    prefix: int = 2
    slope: float = 0.223

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rows, str) or not set(self.rows) <= set(TABLE) or not self.rows:
            raise HeadscopeError(f"position_bias: rows are some of {', '.join(TABLE)}, not {self.rows!r}")
        object.__setattr__(self, "rows", tuple(self.rows))

    def quick(self) -> Self:
        """Two layers in a world of 256 classes of half the width and length, 200 steps at three times the rate."""
        small = {"pairs": 4, "copies": 2, "width": 32, "classes": 256, "labels": 8}
        few = ("causal_2", "residual_full", "residual_causal")
        return replace(self, rows=few, steps=200, batch=64, rate=3e-3, questions=2000, **small)

    @property
    def shape(self) -> Shape:
        """Of the sequences."""
        return Shape(pairs=self.pairs, copies=self.copies, width=self.width, noise=self.noise)

    def network(self, row: Row) -> Network:
        """Untrained, with the weights that torch's generator gives."""
        made: dict[str, Any] = {"mask": row.mask, "encoding": row.encoding, "residual": row.residual}
        return Network(self.width, self.labels, row.depth, **made, **self._masks)

    @property
    def _masks(self) -> dict[str, Any]:
        return {"window": self.window, "prefix": self.prefix, "slope": self.slope}

    def run(self, bench: Bench) -> Mapping[str, float]:
        world = World.draw(self.classes, self.labels, self.width, generator(bench.seed, 2**41))
        found: dict[str, float] = {}
        for name in self.rows:
            torch.manual_seed(bench.seed)
            model = self.network(TABLE[name])
            self._train(name, model, world, bench)
            with torch.no_grad():
                numbers = gaps(model, world, self.shape, self.questions, bench.seed)
            numbers |= self._shares(TABLE[name], model, world, bench.seed)
            found |= {f"{name}/{key}": value for key, value in numbers.items()}
        if len(self.rows) > 2:
            leans = [found[f"{name}/first"] - found[f"{name}/last"] for name in self.rows]
            found["agreement"] = float(spearmanr(leans, [found[f"{name}/first_last"] for name in self.rows]).statistic)
        return found

    def _train(self, name: str, model: Network, world: World, bench: Bench) -> None:
        answers = (0, self.pairs - 1) if TABLE[name].residual else None

        def loss(model: nn.Module, step: int) -> Tensor:
            x, label = world.batch(self.shape, self.batch, generator(bench.seed, step), answers)
            logits = model(x.to(bench.device))
            return cross_entropy(logits, label.to(bench.device))

        few = min(self.questions, 1000)
        watch = Watch(every=max(self.steps // 5, 1), numbers=lambda m: gaps(m, world, self.shape, few, bench.seed))
        adam = torch.optim.AdamW(model.parameters(), self.rate, weight_decay=1e-6)
        bench.train(name, model, loss, adam, steps=self.steps, watch=watch)

    def _shares(self, row: Row, model: Network, world: World, seed: int) -> dict[str, float]:
        """Rollout of the query on the first and last pair and on the first position, after each layer."""
        keep = 0.5 if row.residual else 0.0
        traced = rollout(model, world, self.shape, keep, seed)
        flat = closed_pattern(self.shape.length, mask=row.mask, **self._masks)
        closed = cumulative([flat] * row.depth, keep)[-1]
        found = {"first": traced[-1, :2].sum(), "last": traced[-1, -3:-1].sum(), "first_closed": closed[:2].sum()}
        found |= {"last_closed": closed[-3:-1].sum(), "distance_to_closed": (traced[-1] - closed).abs().sum() / 2}
        found |= {f"first_position_layer_{n}": traced[n, 0] for n in range(row.depth)}
        return {key: float(value) for key, value in found.items()}

    def claims(self, numbers: Numbers) -> list[Claim]:
        made = [self._of_row(name, numbers) for name in self.rows]
        both = [kind for kind in DEEPER if {f"{kind}_2", f"{kind}_6"} <= set(self.rows)]
        made += [_of_depth(kind, numbers) for kind in both]
        made += [self._of_middle(numbers)] if "residual_rope" in self.rows else []
        deepest = [name for name in ("causal_6", "causal_2") if name in self.rows][:1]
        made += [_of_layers(name, numbers) for name in deepest]
        if "agreement" in numbers:
            rank = numbers["agreement"]
            text = f"rank correlation {rank.mean():.2f} over {len(self.rows)} networks"
            says = "rollout on the first pair, less on the last, orders the networks as their gaps do"
            made.append(Claim(says, "", text, bool((rank > 0).all())))
        return made

    def _of_row(self, name: str, numbers: Numbers) -> Claim:
        """Whether first-last has the paper's sign under every seed; within three standard errors of 0 there is none."""
        row, error = TABLE[name], 3 * (0.5 / self.questions) ** 0.5
        ours = {key: numbers[f"{name}/{key}"] for key in NAMES}
        figures = ", ".join(f"{value.mean():+.3f}" for value in ours.values())
        if row.paper is None:
            return Claim(f"{row.says}: no figure of the paper", "", figures, None)
        wanted = _sign(np.array(row.paper[1]), error)
        held = bool((_sign(ours["first_last"], error) == wanted).all())
        says = {1: "the first is preferred to the last", -1: "the last is preferred to the first", 0: "neither end is"}
        return Claim(f"{row.says}: {says[int(wanted)]}", ", ".join(f"{x:+.3f}" for x in row.paper), figures, held)

    def _of_middle(self, numbers: Numbers) -> Claim:
        early, late = (numbers[f"residual_rope/{name}"] for name in ("first_middle", "middle_last"))
        error = 3 * (0.5 / self.questions) ** 0.5
        says = f"{TABLE['residual_rope'].says}: the middle is lost (first-middle, middle-last)"
        held = bool(((early > error) & (late < -error)).all())
        return Claim(says, "+0.472, -0.241", f"{early.mean():+.3f}, {late.mean():+.3f}", held)


def _sign(gap: NDArray[np.float64], error: float) -> NDArray[np.float64]:
    return np.sign(gap) * (np.abs(gap) > error)


def _of_depth(kind: str, numbers: Numbers) -> Claim:
    two, six = (numbers[f"{kind}_{depth}/first_last"] for depth in (2, 6))
    says = f"{kind}: depth 6 leans to the first more than depth 2 (first-last)"
    return Claim(says, DEEPER[kind], f"{two.mean():+.3f}, {six.mean():+.3f}", bool((six > two).all()))


def _of_layers(name: str, numbers: Numbers) -> Claim:
    layers = np.stack([numbers[f"{name}/first_position_layer_{n}"] for n in range(TABLE[name].depth)])
    says = f"{TABLE[name].says}: the query's rollout on the first position grows with every layer"
    return Claim(says, "", " ".join(f"{x:.3f}" for x in layers.mean(1)), bool((np.diff(layers, axis=0) > 0).all()))
