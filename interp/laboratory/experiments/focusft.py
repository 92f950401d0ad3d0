"""FocuSFT: fine-tuning on top of fast weights, with contexts that see themselves in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from headscope.interp.laboratory.decoder import Decoder, Shape
from headscope.interp.laboratory.experiment import Bench, Experiment
from headscope.interp.laboratory.focusft.conversations import Conversations, repeats
from headscope.interp.laboratory.focusft.inner import Inner, answer_loss
from headscope.interp.laboratory.focusft.measures import attention_shares, recall
from headscope.interp.laboratory.focusft.turns import Turned, seeing, turn_mask
from headscope.interp.laboratory.training import Loss, generator
from headscope.interp.laboratory.watch import Watch
from headscope.interp.registry import check_counts
from headscope.interp.results.findings import Claim, Numbers

ARMS = ("plain", "mask", "focusft")
MEASURED = ("recall", "sink", "context")
PRETRAINING, INNER, HELD_OUT = 1, 2, 3  # streams of draws of a seed, beside that of the conversations


@dataclass(frozen=True, kw_only=True)
class FocuSFT(Experiment):
    """Fine-tune one pretrained decoder by plain SFT and by FocuSFT (Pei et al. 2026; JarvisPei/FocuSFT @ c924c48d) on
    conversations about a long context, at the same compute, and see where the answers' rows look.

    Three arms from the same weights: ``plain`` (causal), ``mask`` (contexts see themselves in both directions, no fast
    weights) and ``focusft`` (that mask and fast weights in the inner loop and in the outer step). ``mask`` and
    ``focusft`` take ``steps`` steps; ``plain`` takes as many more as its matrix products are cheaper, so it sees more
    conversations too. The inner loop is the authors' default (``Inner``).

    The paper fine-tunes Qwen2.5-7B at 4,096 tokens. [OURS]: the decoder, its pretraining on texts that repeat
    themselves, the task (``Conversations``), both measures (``attention_shares``), and a learning rate that stays after
    its warm-up (theirs falls along a cosine), so that a longer run holds the shorter one. Our clip of the outer
    gradient counts the base's weights alone; in the authors' Trainer those of the fast weights count in its norm too.

    Args:
        slots: of a context, each of 2 + ``length`` tokens.
        pairs: keys with a value in it, and with a decoy.
        turns: questions of a conversation.
        length: words of a value.
        width: of the stream.
        heads: of a layer.
        layers: of the decoder.
        pretraining: steps on texts that repeat themselves.
        steps: of the arms ``mask`` and ``focusft``.
        batch: texts or conversations a step.
        lr: learning rate of fine-tuning; pretraining takes three times as much.
        inner_steps: of an inner loop.
        inner_rate: its learning rate.
        rank: of the fast weights.
        share: of the layers, the upper ones, that have fast weights.
        judged: held-out conversations.
    """

    name: ClassVar[str] = "focusft"
    source: ClassVar[str] = "arXiv 2605.09932"

    slots: int = 32
    pairs: int = 6
    turns: int = 2
    length: int = 3
    width: int = 64
    heads: int = 4
    layers: int = 4
    pretraining: int = 1000
    steps: int = 400
    batch: int = 16
    lr: float = 1e-3
    inner_steps: int = 2
    inner_rate: float = 1.0
    rank: int = 32
    share: float = 0.35
    judged: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("pretraining", "steps", "batch", "inner_steps", "rank", "judged")
        check_counts(1, **{name: getattr(self, name) for name in sizes})

    def quick(self) -> Self:
        return replace(self, slots=8, pairs=2, turns=1, width=32, heads=2, pretraining=60, steps=15, batch=8, judged=32)

    @property
    def task(self) -> Conversations:
        """The law of the conversations."""
        return Conversations(slots=self.slots, pairs=self.pairs, turns=self.turns, length=self.length)

    @property
    def inner(self) -> Inner:
        """The inner loop; alpha is twice the rank, as the authors have it."""
        share, alpha = self.share, 2.0 * self.rank
        return Inner(steps=self.inner_steps, rate=self.inner_rate, rank=self.rank, alpha=alpha, share=share)

    def run(self, bench: Bench) -> Mapping[str, float]:
        base = self._pretrained(bench)
        held = self._drawn(bench, self.judged, generator(bench.seed * 4 + HELD_OUT, 0))
        cost = {arm: flops(base, self._loss(bench, arm)) for arm in ARMS}
        visible = 1 + held[1].nonzero()[:, 1].double()
        numbers = {f"cost of a step, {arm}": cost[arm] / cost["plain"] for arm in ARMS}
        numbers |= {"recall, before": recall(base, *held), "uniform sink": float((1 / visible).mean())}
        numbers |= {f"{name}, before": value for name, value in self._inner_losses(bench, base, *held).items()}
        for arm in ARMS:
            steps = round(self.steps * cost["focusft"] / cost["plain"]) if arm == "plain" else self.steps
            numbers |= self._arm(bench, arm, deepcopy(base), steps, held)
        return numbers

    def _arm(self, bench: Bench, arm: str, model: Decoder, steps: int, held: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Fine-tune ``model`` by one arm; the numbers of it."""

        def seen(model: Any) -> dict[str, float]:
            return {"recall": recall(model, *held), **attention_shares(model, *held)}

        adam = torch.optim.AdamW(model.parameters(), self.lr, weight_decay=0.01)
        every = next(n for n in range(max(1, self.steps // 4), 0, -1) if self.steps % n == 0)  # so one is at ``steps``
        watch = Watch(every=every, numbers=seen)
        rows = bench.train(
            arm, model, self._loss(bench, arm), adam, steps=steps, watch=watch, rate=_warm(self.steps), clip=1.0
        )
        numbers = {f"{name}, {arm}": float(rows[-1][name]) for name in MEASURED}
        with self._as_trained(bench, arm, model, *held):
            shares = attention_shares(model, *held)
        numbers |= {f"{name} while it trains, {arm}": value for name, value in shares.items()}
        if arm == "plain":
            same = next(row for row in rows if row["step"] >= self.steps)
            numbers |= {f"{name}, plain after as many steps": float(same[name]) for name in MEASURED}
        if arm == "focusft":
            numbers |= {f"{name}, after": value for name, value in self._inner_losses(bench, model, *held).items()}
        return numbers

    def _inner_losses(self, bench: Bench, model: Decoder, ids: Tensor, answered: Tensor) -> dict[str, float]:
        """The answers' loss under the mask of turns, without fast weights and with those made of the same answers."""
        found = {}
        for name, arm in (("loss", "mask"), ("loss on fast weights", "focusft")):
            with self._as_trained(bench, arm, model, ids, answered), torch.no_grad():
                found[name] = float(answer_loss(model(ids), ids, answered))
        return found

    def _pretrained(self, bench: Bench) -> Decoder:
        shape = Shape(
            vocabulary=self.task.vocabulary, layers=self.layers, heads=self.heads, width=self.width,
            hidden=2 * self.width, context=self.task.tokens,
        )  # fmt: skip
        model = Decoder(shape, Turned)

        def loss(model: Any, step: int) -> Tensor:
            source = generator(bench.seed * 4 + PRETRAINING, step)
            ids = repeats(self.batch, 64, self.task.vocabulary, source).to(bench.device)
            return answer_loss(model(ids), ids, torch.ones_like(ids, dtype=torch.bool))

        adam = torch.optim.AdamW(model.parameters(), 3 * self.lr, weight_decay=0.01)
        watch = Watch(every=self.pretraining)
        bench.train("pretraining", model, loss, adam, steps=self.pretraining, watch=watch, rate=_warm(500), clip=1.0)
        return model

    def _drawn(self, bench: Bench, count: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        ids, answered = self.task.draw(count, source)
        return ids.to(bench.device), answered.to(bench.device)

    def _loss(self, bench: Bench, arm: str) -> Loss:
        def loss(model: Any, step: int) -> Tensor:
            ids, answered = self._drawn(bench, self.batch, generator(bench.seed * 4, step))
            with self._as_trained(bench, arm, model, ids, answered, step):
                return answer_loss(model(ids), ids, answered)

        return loss

    @contextmanager
    def _as_trained(
        self, bench: Bench, arm: str, model: Decoder, ids: Tensor, answered: Tensor, step: int = -1
    ) -> Iterator[None]:
        """Inside the block ``model`` is what an arm trains on this batch: its mask, and fast weights made of it."""
        if arm == "plain":
            yield
            return
        mask, fast = turn_mask(answered), []
        if arm == "focusft":
            fast = self.inner.adapt(model, ids, answered, mask, generator(bench.seed * 4 + INNER, step))
        with seeing(model, mask), self.inner.adapted(fast):
            yield

    def claims(self, numbers: Numbers) -> list[Claim]:
        def each(name: str) -> str:
            return "/".join(f"{x:.3f}" for x in numbers[name])

        def shown(name: str) -> str:
            return ", ".join(f"{arm} {each(f'{name}, {arm}')}" for arm in ARMS)

        def more(name: str, sign: int = 1) -> bool:
            return bool(np.all(sign * (numbers[f"{name}, focusft"] - numbers[f"{name}, plain"]) > 0))

        learned = bool(np.all(numbers["recall, plain"] > numbers["recall, before"]))
        both = learned and bool(np.all(numbers["recall, focusft"] > numbers["recall, before"]))
        sunk = both and bool(np.all(numbers["sink, plain"] > numbers["uniform sink"]))
        lower, losses = True, []
        for when in ("before", "after"):
            without, on = numbers[f"loss, {when}"], numbers[f"loss on fast weights, {when}"]
            lower = lower and bool(np.all(on < without))
            losses.append(f"{when} {without.mean():.3f}, on them {on.mean():.3f}")
        return [
            Claim("Fast weights lower the loss of the answers that they were made of, before fine-tuning and after",
                  "", "; ".join(losses), lower),
            Claim("Less attention on the sink while it trains (- where plain SFT has none, or an arm did not learn)",
                  "1/529", f"{shown('sink while it trains')}; uniform {each('uniform sink')}",
                  more("sink while it trains", -1) if sunk else None),
            Claim("More attention on the context while it trains", "x 3",
                  shown("context while it trains"), more("context while it trains") if both else None),
            Claim("Less attention on the sink as the model is used: causal, without fast weights", "",
                  f"{shown('sink')}; plain after as many steps {each('sink, plain after as many steps')}",
                  more("sink", -1) if sunk else None),
            Claim("Answers are right more often than after plain SFT of the same compute", "up to +14 points",
                  shown("recall"), more("recall") if learned else None),
            Claim("Answers are right more often than after as many steps of plain SFT", "",
                  f"{shown('recall')}; plain after as many steps {each('recall, plain after as many steps')}",
                  bool(np.all(numbers["recall, focusft"] > numbers["recall, plain after as many steps"]))
                  if learned else None),
        ]  # fmt: skip


def _warm(steps: int) -> Any:
    """A learning rate that rises along the first tenth of ``steps`` and stays."""
    return lambda step: min(1.0, 10 * (step + 1) / steps)


def flops(model: Decoder, loss: Loss) -> int:
    """Operations of one training step, forward and backward, as torch counts them: matrix products alone, those of
    hidden keys too. The model keeps no gradient of it."""
    forward: Any = sdpa_flop_count
    backward: Any = sdpa_backward_flop_count
    own = torch.ops.aten  # torch does not count its attention on a CPU
    ours: dict[Any, Any] = {
        own._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: forward(q, k, v),
        own._scaled_dot_product_flash_attention_for_cpu_backward: lambda z, q, k, v, *_, **__: backward(z, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        loss(model, 0).backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())
