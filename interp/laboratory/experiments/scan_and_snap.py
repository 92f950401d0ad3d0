"""Scan and snap: which tokens one attention layer comes to look at, and when it stops learning to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headscope.interp.errors import HeadscopeError
from headscope.interp.laboratory.experiment import Bench, Experiment
from headscope.interp.laboratory.scan_and_snap.data import Corpus
from headscope.interp.laboratory.scan_and_snap.measures import (
    STILL,
    composition,
    entropy,
    moved,
    prediction_error,
    snap,
    speeds,
    summary,
)
from headscope.interp.laboratory.scan_and_snap.model import OneLayer
from headscope.interp.laboratory.training import generator
from headscope.interp.laboratory.watch import Watch
from headscope.interp.results.findings import Claim, Numbers


@dataclass(frozen=True, kw_only=True)
class ScanAndSnap(Experiment):
    """Tian et al. 2023 (arXiv 2305.16380): next-token prediction by one attention layer and a linear decoder.

    Three kinds of runs. ``paper``: the rates of the authors' figure of attention over time, from zero. ``slow`` and
    ``fast``: small steps without momentum, the decoder as fast as attention and ``faster`` times as fast, which is what
    the theory assumes. The sweep: random starts and every pair of rates of their figure of entropies.

    Of the first three: ``order``, the rank correlation between how much a distinct token's logit grew and how often its
    class draws it; ``rising`` and ``falling``, the shares of distinct tokens whose logit grew and of common ones whose
    logit fell; ``law_error``, how far gains are from the law of ``predicted_gains``; ``fastest`` and ``snap``, the
    steps at which attention changes most and has frozen; ``moved_after``, the total variation from there to the end.
    One-layer models over one-hot tokens: nothing here says that larger models learn so.

    Sizes and rates are those of the authors' logs (luckmatters @ 76a25aa, ``figure_4.log`` and ``figure_6.log``).
    [OURS] ``paper`` has two next tokens a last token, as their sweep has, where their figure has one: with one, no
    token is common to two next tokens of the same query. The theory regime is ours, and so are all thresholds.

    Args:
        last: last tokens of the first three runs.
        following: next tokens of each.
        common, distinct: tokens of every class, and of one class alone.
        length: tokens of a sequence.
        batch: sequences a step.
        steps: of SGD.
        rate: of attention (eta_Z) in ``paper``; the decoder's (eta_Y) is the same.
        momentum: in ``paper`` and the sweep.
        small, small_steps: eta_Z and steps of ``slow`` and ``fast``.
        faster: eta_Y / eta_Z in ``fast``.
        sweep_last, sweep_rates, sweep_ratios: last tokens, eta_Z and eta_Y / eta_Z of the sweep.
    """

    name: ClassVar[str] = "scan_and_snap"
    source: ClassVar[str] = "arXiv 2305.16380"

    last: int = 3
    following: int = 2
    common: int = 10
    distinct: int = 10
    length: int = 128
    batch: int = 128
    steps: int = 100
    rate: float = 1.0
    momentum: float = 0.9
    small: float = 0.2
    small_steps: int = 400
    faster: float = 10.0
    sweep_last: tuple[int, ...] = (1, 3, 5, 10)
    sweep_rates: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0)
    sweep_ratios: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.common < 1 or self.distinct < 3:
            raise HeadscopeError("scan_and_snap needs a common token, and 3 distinct tokens a class to have an order")
        for name in ("sweep_last", "sweep_rates", "sweep_ratios"):
            given = getattr(self, name)
            if isinstance(given, str) or not given or any(isinstance(one, str) or one <= 0 for one in given):
                raise HeadscopeError(f"scan_and_snap: {name} is a list of numbers above 0, as [1, 3], not {given!r}")
            object.__setattr__(self, name, tuple(given))

    def quick(self) -> Self:
        """Half the small steps, and two runs of the sweep."""
        return replace(self, small_steps=200, sweep_last=(1,), sweep_rates=(1.0,), sweep_ratios=(1.0, 10.0))

    def run(self, bench: Bench) -> Mapping[str, float]:
        found: dict[str, float] = {}
        own = self._corpus(self.last)
        regimes = {"paper": (self.rate, self.rate, self.momentum, self.steps)}
        regimes["slow"] = (self.small, self.small, 0.0, self.small_steps)
        regimes["fast"] = (self.small * self.faster, self.small, 0.0, self.small_steps)
        for label, (decoder, attention, momentum, steps) in regimes.items():
            model = OneLayer(own.vocabulary)
            sgd = self._sgd(model, decoder, attention, momentum)
            every = max(steps // 50, 1)
            history = self._train(label, model, sgd, own, steps, every, bench)
            found |= {f"{label}/{name}": value for name, value in self._dynamics(history, own, every).items()}
        return found | self._sweep(bench)

    def _corpus(self, last: int) -> Corpus:
        sizes = {"common": self.common, "distinct": self.distinct, "length": self.length}
        return Corpus(last=last, following=self.following, **sizes)

    def _sgd(self, model: OneLayer, decoder: float, attention: float, momentum: float) -> torch.optim.SGD:
        groups = [{"params": [model.decoder], "lr": decoder}, {"params": [model.attention.logits], "lr": attention}]
        return torch.optim.SGD(groups, lr=attention, momentum=momentum)

    def _train(
        self, label: str, model: OneLayer, sgd: torch.optim.SGD, corpus: Corpus, steps: int, every: int, bench: Bench
    ) -> Tensor:
        """Attention's logits of every class's query at every record: (record, class, token)."""
        kept: list[Tensor] = []

        def loss(model: nn.Module, step: int) -> Tensor:
            before, last, following = (
                x.to(bench.device) for x in corpus.batch(self.batch, generator(bench.seed, step))
            )
            return cross_entropy(model(before, last), following)

        def numbers(model: OneLayer) -> dict[str, float]:
            kept.append(model.attention.logits.detach()[corpus.queries].cpu().clone())
            return summary(kept[-1], corpus)

        before, last, _ = corpus.batch(32, generator(bench.seed, -1))
        watch = Watch(every=every, numbers=numbers, inputs={"before": before, "last": last}, statistics=("entropy",))
        # seconds long: made again as a whole after a stop, so that no record is missing
        bench.train(label, model, loss, sgd, steps=steps, watch=watch, save_every=steps)
        return torch.stack(kept)

    def _dynamics(self, history: Tensor, corpus: Corpus, every: int) -> dict[str, float]:
        chances = corpus.probabilities()
        gains = (history[-1] - history[0]).gather(1, corpus.own)
        fell = (history[-1] - history[0])[:, : corpus.common] < 0
        shares = composition(history, chances)
        speed = speeds(history, chances > 0)
        at = snap(speed)
        chance = chances.gather(1, corpus.own)
        orders = [spearmanr(a, b).statistic for a, b in zip(gains, chance, strict=True)]
        found = {"order": np.mean(orders), "rising": (gains > 0).double().mean(), "falling": fell.double().mean()}
        found |= {"law_error": prediction_error(gains, chance), "tokens": entropy(shares[-1]).mean().exp()}
        found |= {"common_before": shares[0, :, : corpus.common].sum(1).mean()}
        found |= {"common_after": shares[-1, :, : corpus.common].sum(1).mean(), "largest": shares[-1].amax(1).mean()}
        found |= {
            "fastest": every * (int(speed.argmax()) + 1),
            "snap": every * at,
            "last_speed": speed[-1] / speed.max(),
        }
        found |= {"moved_before": moved(shares[0], shares[at]), "moved_after": moved(shares[at], shares[-1])}
        return {name: float(value) for name, value in found.items()}

    def _sweep(self, bench: Bench) -> dict[str, float]:
        """Mean entropy of c_n at the end, by last tokens, eta_Z and eta_Y / eta_Z."""
        found = {}
        for last in self.sweep_last:
            corpus = self._corpus(last)
            for rate in self.sweep_rates:
                for ratio in self.sweep_ratios:
                    label = f"sweep_{last}_{rate:g}_{ratio:g}"
                    torch.manual_seed(bench.seed)
                    model = OneLayer(corpus.vocabulary).scatter()
                    sgd = self._sgd(model, rate * ratio, rate, self.momentum)
                    history = self._train(label, model, sgd, corpus, self.steps, self.steps, bench)
                    found[label] = float(entropy(composition(history[-1], corpus.probabilities())).mean())
        return found

    def claims(self, numbers: Numbers) -> list[Claim]:
        return [*_scan(numbers), *_order(numbers), *_freeze(numbers), *self._rates(numbers)]

    def _rates(self, numbers: Numbers) -> list[Claim]:
        """Whether a decoder that is faster still leaves attention less sparse, in every setting of the sweep."""
        slow, fast = min(self.sweep_ratios), max(self.sweep_ratios)
        if slow == fast:
            return []
        pairs = [f"sweep_{last}_{rate:g}" for last in self.sweep_last for rate in self.sweep_rates]
        low, high = (np.stack([numbers[f"{pair}_{ratio:g}"] for pair in pairs]) for ratio in (slow, fast))
        ours = (
            f"{low.mean():.3f} nats at {slow:g}, {high.mean():.3f} at {fast:g}; {(high > low).mean():.2f} of the pairs"
        )
        return [Claim("the larger eta_Y / eta_Z, the less sparse attention ends", "", ours, bool((high > low).all()))]


def _scan(numbers: Numbers) -> list[Claim]:
    rising, falling = numbers["paper/rising"], numbers["paper/falling"]
    before, after = numbers["paper/common_before"], numbers["paper/common_after"]
    signs = f"{rising.mean():.2f} of the distinct rise, {falling.mean():.2f} of the common fall"
    share = f"{before.mean():.3f} before, {after.mean():.3f} after"
    return [
        Claim(
            "logits of all distinct tokens rise, of all common ones fall",
            "1, 1",
            signs,
            bool((rising == 1).all() and (falling == 1).all()),
        ),
        Claim("attention leaves the common tokens", "", f"their share: {share}", bool((after < before).all())),
    ]


def _order(numbers: Numbers) -> list[Claim]:
    made = []
    for label in ("paper", "fast"):
        order = numbers[f"{label}/order"]
        says = f"{label} rates: distinct tokens gain in the order of P(l | m, n)"
        made.append(Claim(says, "1", f"rank correlation {order.mean():.3f}", bool((order > 0.9).all())))
    slow, fast, paper = (numbers[f"{label}/law_error"] for label in ("slow", "fast", "paper"))
    ours = f"error {fast.mean():.2f} of the gain; {slow.mean():.2f} equal rates, {paper.mean():.2f} the paper's"
    says = "gains follow the law of a fast decoder the closer, the faster it is"
    return [*made, Claim(says, "", ours, bool(((fast < slow) & (slow < paper)).all()))]


def _freeze(numbers: Numbers) -> list[Claim]:
    before, after, at, last_speed, largest, tokens = (
        numbers[f"paper/{name}"] for name in ("moved_before", "moved_after", "snap", "last_speed", "largest", "tokens")
    )
    slow, fast = numbers["slow/fastest"], numbers["fast/fastest"]
    frozen = f"total variation {before.mean():.3f} until step {at.mean():.0f}, {after.mean():.3f} after it"
    many = f"{tokens.mean():.1f} tokens (exp of the entropy), the largest holds {largest.mean():.2f}"
    says = "snap: change falls to a tenth of the fastest, and less is still to come than was before"
    return [
        Claim(says, "", frozen, bool(((after < before) & (last_speed < STILL)).all())),
        Claim("no token takes all", "", many, bool((largest < 0.5).all())),
        Claim(
            "a faster decoder brings the fastest change sooner",
            "",
            f"step {slow.mean():.0f} with equal small rates, {fast.mean():.0f} with the faster decoder",
            bool((fast < slow).all()),
        ),
    ]
