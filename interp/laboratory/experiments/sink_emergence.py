"""When attention sinks emerge: one small language model, trained under one change at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headscope.interp.errors import HeadscopeError
from headscope.interp.laboratory.decoder import Decoder, Shape
from headscope.interp.laboratory.experiment import Bench, Experiment
from headscope.interp.laboratory.sinks.measures import received, sink_rates, sink_statistics
from headscope.interp.laboratory.sinks.text import Text, windows
from headscope.interp.laboratory.training import generator
from headscope.interp.laboratory.variants import VARIANTS
from headscope.interp.laboratory.watch import Watch
from headscope.interp.results.findings import Claim, Numbers
from headscope.interp.tracing.recording import trace
from headscope.kernels.masks import Mask

POSITIONS = 10  # whose rates are kept: the authors print as many
FIXED = 1  # the byte that is put at a fixed position
PROBE = -1  # the step whose draws are the held-out texts: no step of training has it


@dataclass(frozen=True)
class Arm:
    """One model of the grid: what is different about it.

    ``rate`` and ``decay`` are factors; ``share`` of the text that is trained on; ``window``, the tokens that a query
    sees; ``prefix``, how many first tokens every query sees (their loss is left out); ``fixed``, the position whose
    token is always the same; ``begin`` and ``repeats`` False: texts have no beginning token, and none says its first
    half twice.
    """

    variant: str = "softmax"
    rate: float = 1.0
    decay: float = 1.0
    share: float = 1.0
    window: int | None = None
    prefix: int = 0
    fixed: int | None = None
    begin: bool = True
    repeats: bool = True

    @property
    def mask(self) -> Mask:
        """What a query sees."""
        if self.prefix:
            return Mask(right=None, rule=lambda b, h, q, k: (k <= q) | (k < self.prefix))
        return Mask.causal(window=self.window)


ARMS: Mapping[str, Arm] = {
    "softmax": Arm(),
    "sigmoid": Arm("sigmoid"),
    "sigmoid_normed": Arm("sigmoid_normed"),
    "elu": Arm("elu"),
    "elu_normed": Arm("elu_normed"),
    "kernel_elu": Arm("kernel_elu"),
    "kernel_elu_normed": Arm("kernel_elu_normed"),
    "kernel_identity": Arm("kernel_identity"),
    "kernel_mlp": Arm("kernel_mlp"),
    "key_bias": Arm("key_bias"),
    "key_value_bias": Arm("key_value_bias"),
    "value_bias": Arm("value_bias"),
    "slow": Arm(rate=0.25),
    "no_decay": Arm(decay=0.0),
    "little_text": Arm(share=0.02),
    "window": Arm(window=16),
    "prefix": Arm(prefix=4),
    "fixed": Arm(fixed=3, begin=False),
    "no_beginning": Arm(begin=False),
    "no_repeats": Arm(repeats=False),
}


@dataclass(frozen=True, kw_only=True)
class SinkEmergence(Experiment):
    """Gu et al. 2024, "When Attention Sink Emerges in Language Models" (arXiv 2410.10781, section 4 to 7; code
    sail-sg/Attention-Sink): Sink_k^eps over training, for one change at a time of optimiser, data, mask and weights.

    The metric is theirs: alpha_k = 1/(T - k) sum_{i >= k} A[i, k] of held-out texts of T = 64 tokens, and the
    percentage of (text, layer, head) with alpha_k > 0.3. For weights that are not normalised, A is |w| over its row's
    sum.

    [OURS]: a model that one CPU core trains in minutes (they: 60M parameters, 20,000 steps of 1M tokens of the Pile, a
    rate of 4e-4), on bytes of the bundled novel. Sinks do not emerge within 1,000 steps by themselves, but do
    where texts have a beginning token and every other one says its first half twice (which gives a head something to
    do that it mostly has not): these are the defaults; held-out texts say nothing twice, and ``no_beginning`` and
    ``no_repeats`` are arms. At a rate of 1.5e-2 they come under two seeds of three. A learned key begins at 0 and is
    one a head.
    Claims beside softmax are judged only where it has a sink under every seed.

    What it does not show: what larger models do; or that a sink is of use to the model.

    Args:
        arms: of ``ARMS``, with commas between.
        text: ``"prose"`` or ``"python"``: what is read.
        layers, heads, width, context: of the model; the MLP is twice as wide as the model, positions are RoPE's.
        batch, steps, warmup, rate, decay: of AdamW (betas 0.9 and 0.95, gradients clipped to 1), constant rate after
            the warm-up, as theirs.
        every: steps between two measurements.
        samples: held-out texts.
        epsilon: the threshold of the metric.
    """

    name: ClassVar[str] = "sink_emergence"
    source: ClassVar[str] = "arXiv 2410.10781"

    arms: str = ",".join(ARMS)
    text: str = "prose"
    layers: int = 2
    heads: int = 4
    width: int = 64
    context: int = 64
    batch: int = 8
    steps: int = 1000
    warmup: int = 100
    rate: float = 4e-3
    decay: float = 0.1
    every: int = 250
    samples: int = 64
    epsilon: float = 0.3

    def quick(self) -> Self:
        return replace(self, arms="softmax,sigmoid", steps=500, every=250, samples=32)

    def run(self, bench: Bench) -> Mapping[str, float]:
        names = self.arms.split(",")
        unknown = [name for name in names if name not in ARMS]
        if unknown:
            raise HeadscopeError(f"there is no arm {unknown[0]!r}; choose {', '.join(ARMS)}")
        found: dict[str, float] = {}
        for name in names:
            last = self.trained(bench, name, ARMS[name])[-1]
            found |= {f"{name} {number}": value for number, value in last.items() if number != "step"}
        return found

    def trained(self, bench: Bench, name: str, arm: Arm) -> list[dict[str, Any]]:
        """The rows of one arm's training."""
        torch.manual_seed(bench.seed)
        text = Text.load(self.text, arm.share)
        shape = Shape(
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            hidden=2 * self.width,
            context=self.context,
            mask=arm.mask,
        )
        model = Decoder(shape, VARIANTS[arm.variant])
        rate, decay = self.rate * arm.rate, self.decay * arm.decay
        adam = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=decay, fused=True)
        held = self.drawn(text.held, self.samples, bench.seed, PROBE, arm)

        def loss(model: nn.Module, step: int) -> Tensor:
            ids = self.drawn(text.train, self.batch, bench.seed, step, arm)
            return next_token_loss(model, ids.to(bench.device), arm.prefix)

        return bench.train(
            name,
            model,
            loss,
            adam,
            steps=self.steps,
            watch=Watch(every=self.every, numbers=lambda model: self.measured(model, held.to(bench.device), arm)),
            rate=lambda step: min(1.0, (step + 1) / self.warmup),
            clip=1.0,
            save_every=max(1, self.steps - 1),  # a killed run does not train again what had come to its end
        )

    def drawn(self, text: Tensor, count: int, seed: int, step: int, arm: Arm) -> Tensor:
        """The texts (count, context) of a step."""
        ids = windows(text, count, self.context, generator(seed, step), arm.begin)
        if arm.repeats and step != PROBE:
            half = self.context // 2
            ids[::2, half : 2 * half] = ids[::2, :half]
        if arm.fixed is not None:
            ids[:, arm.fixed] = FIXED
        return ids

    def measured(self, model: nn.Module, ids: Tensor, arm: Arm) -> dict[str, float]:
        """``loss`` (nats a byte); ``sink``, Sink_1^eps of the first token, %; ``elsewhere``, the largest of the next
        ``POSITIONS`` - 1; ``extra``, that of keys that are no token; ``place``, the position with the largest mean
        alpha, from 0; ``first_mass``, the first token's."""
        with trace(model, sink_statistics(POSITIONS, self.context)) as tracer:
            loss = next_token_loss(model, ids, arm.prefix)
        alpha = received(tracer.record, halves=VARIANTS[arm.variant].maps == 2)
        rates = sink_rates(alpha, self.epsilon)
        return {
            "loss": float(loss),
            "sink": rates[0],
            "elsewhere": rates[1:POSITIONS].max(),
            "place": float(alpha[..., :POSITIONS].mean((0, 1, 2)).argmax()),
            "extra": rates[POSITIONS],
            "first_mass": alpha[..., 0].mean(),
        }

    def claims(self, numbers: Numbers) -> list[Claim]:
        def rate(name: str, number: str = "sink") -> Any:
            return numbers.get(f"{name} {number}")

        base = rate("softmax")
        grown = base is not None and bool((base >= 2 * rate("softmax", "elsewhere")).all() and base.min() >= 5)
        found: list[Claim] = []

        def claim(says: str, paper: str, name: str, held: Any, number: str = "sink") -> None:
            value = rate(name, number)
            if value is None or base is None:
                return
            shown = f"{value.mean():.1f} [{value.min():.1f}, {value.max():.1f}] beside {base.mean():.1f}"
            found.append(Claim(says, paper, shown, bool(held(value)) if grown or name == "softmax" else None))

        claim("softmax: the first token becomes a sink (Sink_1, %)", "18.2", "softmax", lambda x: grown)
        for name in ("sigmoid", "elu", "kernel_elu", "kernel_identity", "kernel_mlp"):
            claim(f"{name}, not normalised: no sink", "about 0", name, lambda x: (x <= 0.2 * base).all())
        for name in ("sigmoid_normed", "elu_normed"):
            claim(f"{name}: a sink as with softmax", "as softmax", name, lambda x: (x >= 0.5 * base).all())
        for name in ("key_bias", "key_value_bias"):
            claim(f"{name}: the first token is no sink", "about 0", name, lambda x: (x <= 0.2 * base).all())
            claim(f"{name}: the learned key is", "", name, lambda x: (x >= 0.5 * base).all(), "extra")
        claim(
            "value_bias: the first token is a sink still", "as softmax", "value_bias", lambda x: (x >= 0.5 * base).all()
        )
        claim("a quarter of the learning rate: less", "less", "slow", lambda x: (x < base).all())
        claim("no weight decay: less", "less", "no_decay", lambda x: x.mean() < base.mean())
        claim("2 % of the text: less", "less", "little_text", lambda x: (x < base).all())
        claim("a window of 16: the sink stays on the first token", "yes", "window", lambda x: (x == 0).all(), "place")
        claim("a prefix of 4: the sink is in the prefix", "yes", "prefix", lambda x: (x < 4).all(), "place")
        claim("a fixed token at 3: the sink is there", "yes", "fixed", lambda x: (x == 3).all(), "place")
        claim("no text repeats: a sink all the same", "18.2", "no_repeats", lambda x: (x >= 0.5 * base).all())
        claim("no beginning token: a sink all the same", "18.2", "no_beginning", lambda x: (x >= 0.5 * base).all())
        return found


def next_token_loss(model: nn.Module, ids: Tensor, prefix: int = 0) -> Tensor:
    """Mean cross-entropy of the tokens behind the first ``prefix``, in nats."""
    logits = model(ids)[:, max(prefix - 1, 0) : -1]
    return cross_entropy(logits.flatten(0, 1), ids[:, max(prefix, 1) :].flatten())
