"""DuoAttention: a gate on every key head, trained to stream wherever the last hidden states allow it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.cache.classes import full_heads
from headscope.interp.cache.rows.streaming_llm import StreamingLLM
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.causal.gates import Tokens
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites import attached
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.gradients import frozen
from headscope.interp.sites.unwrap import takes
from headscope.interventions.applying import size
from headscope.interventions.attention.evict import EvictKeys
from headscope.interventions.fitted.base import Data, Fit, Fitted, every_head
from headscope.interventions.fitted.data import responses
from headscope.interventions.fitted.passkeys import passkeys
from headscope.interventions.fitted.training import Curve, Schedule, told, train
from headscope.kernels.score_edits import ScoreEdit


@dataclass(frozen=True)
class Trapezoid(Schedule):
    """``updates`` steps; the rate rises over the first fifth and falls over the last, never below a tenth."""

    updates: int = 2000

    def steps(self, examples: int) -> int:
        return self.updates

    def factor(self, step: int, steps: int) -> float:
        fifth = max(1, steps // 5)
        return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


class Streams(Handler):
    """Two passes over one text: the model's own, whose outputs z are kept, and one of streaming heads, whose z is gate
    * the kept one + (1 - gate) * what streaming gives."""

    def __init__(self, policy: StreamingLLM, kept: int) -> None:
        self.policy, self.kept = policy, torch.tensor(kept)
        self.streaming = False
        self.whole: dict[int, Tensor] = {}
        self.gates: dict[int, Tensor] = {}  # (kv_head,) of each layer

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Scores beyond the window, -inf in the second pass."""
        if not self.streaming:
            return call
        kept = self.kept.to(call.query.device)

        def shown(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return torch.where(self.policy.shows(q, k, kept), s, -torch.inf)

        return call.with_score_edit(ScoreEdit(shown))

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """Keep z, or blend."""
        if not self.streaming:
            dtype = torch.promote_types(z.dtype, torch.float32)
            if call.layer not in self.gates:
                ones = torch.ones(call.key.shape[1], dtype=dtype, device=z.device)
                self.gates[call.layer] = ones.requires_grad_(True)
            self.whole[call.layer] = z.detach()
            return z
        gates = self.gates[call.layer].clamp(0, 1)
        gate = gates.repeat_interleave(z.shape[1] // len(gates))[:, None, None].to(z.device)
        return (gate * self.whole[call.layer] + (1 - gate) * z).to(z.dtype)


@dataclass(frozen=True, kw_only=True)
class DuoAttention(Fit):
    """Train a gate for every key head between whole attention and a streaming one; low ones stream: DuoAttention.

    Xiao et al. 2024 (arXiv 2410.10819; ``duo_attn/train.py``, ``patch/llama.py:41-150`` @ fe93c314). Of every text the
    model's own outputs z are kept; a second stream, with hidden states of its own, sees the first ``sink`` tokens and
    the last ``recent``, and its heads give gate * z + (1 - gate) * z_streaming. The loss is the mean over the tokens of
    the response, questions included, of the mean square of the difference of the last hidden states (after the last
    norm), + ``penalty`` * mean |gate|. Only gates are trained, from 1, cut to [0, 1] before every step: AdamW without
    decay, a rate that rises over a fifth of the steps and falls over the last. Heads of gates below the ``sparsity``
    quantile stream: an ``EvictKeys`` of them with ``keep_sink`` and ``keep_recent``.

    What differs: two passes in place of a batch of two, gates in float32 (theirs are bfloat16), the order of texts, and
    nothing of several GPUs. Data are rows {"prompt", "response"}, or "passkeys": ``texts`` of them
    (``headscope.interventions.fitted.passkeys``) with ``shortest`` to ``longest`` tokens of prose.

    What it does not show: that heads with low gates do nothing far away; what they find there may matter for other
    texts than these.

    Args:
        sparsity: the share of key heads that stream (theirs: 0.5 with grouped heads, 0.75 without).
        updates: steps.
        rate: of AdamW, at its highest.
        penalty: on the mean gate.
        sink, recent: what streaming heads see in training.
        keep_sink, keep_recent: what they see in use.
        batch: texts of an update.
        texts, shortest, longest: of the data "passkeys".
    """

    name: ClassVar[str] = "duo_attention"
    unit: ClassVar[str] = "gate"
    source: ClassVar[str] = "arXiv 2410.10819"

    sparsity: float = 0.5
    updates: int = 2000
    rate: float = 0.02
    penalty: float = 0.05
    sink: int = 128
    recent: int = 256
    keep_sink: int = 64
    keep_recent: int = 256
    batch: int = 1
    texts: int = 50
    shortest: int = 1000
    longest: int = 32000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sparsity < 1 or not self.rate > 0 or self.penalty < 0 or min(self.sink, self.keep_sink) < 0:
            raise HeadscopeError(
                "duo_attention: sparsity lies between 0 and 1, rate is above 0, penalty, sink and keep_sink 0 or more"
            )
        counts = self.updates, self.recent, self.keep_recent, self.batch, self.texts, self.shortest
        if min(counts) < 1 or self.longest < self.shortest:
            raise HeadscopeError(
                "duo_attention: updates, recent, keep_recent, batch, texts and shortest are 1 or more, and longest is "
                "not below shortest"
            )

    def fit(self, model: ModelLike, data: Data, *, progress: bool = True) -> DuoAttentionResult:
        """Gates, and the edit of the heads that stream.

        Raises:
            HeadscopeError: data of another form, a text that streaming heads would see whole, or no layer attends.
        """
        lm = load_model(model)
        if isinstance(data, str) and data == "passkeys":
            lengths = np.linspace(self.shortest, self.longest, self.texts).astype(int).tolist()
            data = passkeys(lm, lengths, seed=self.seed)
        context = lm.info.context_length
        rows = [row[0] for row in responses(lm, data, "sft", end=False, longest=context or 1 << 40)]
        least = min(len(x) + len(y) for x, y in rows)
        if least <= self.sink + self.recent:
            raise HeadscopeError(
                f"duo_attention: a text has {least} tokens, and streaming heads see {self.sink + self.recent}: give "
                "longer texts, or a smaller sink and recent"
            )
        schedule = Trapezoid(self.rate, batch=self.batch, clip=math.inf, updates=self.updates)
        with frozen(lm), _streams(lm, StreamingLLM(sink=self.sink), self.sink + self.recent) as (streams, hidden):
            with torch.no_grad():
                hidden(rows[0])
            gates = list(streams.gates.values())
            count = sum(map(len, gates))
            if not count:
                raise HeadscopeError(f"{lm.name} has no layer that attends")
            loss = _distillation(streams, hidden, rows)
            lasso = self.penalty / count
            curve = train(gates, loss, len(rows), schedule, self.seed, penalty=lasso, what="gates", progress=progress)
        shape, table = size(lm), {layer: x.detach().clamp(0, 1).cpu().double() for layer, x in streams.gates.items()}
        scores = _by_head(table, shape, every_head(lm))
        used = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seed"}
        made = provenance(lm, seed=self.seed, prompts=[repr(row) for row in rows], **used)
        made |= {"steps": {"gates": told(schedule, len(rows), count)}}
        group = lm.info.heads // lm.info.kv_heads
        edit = self.edit(scores, group)
        return DuoAttentionResult(edit=edit, provenance=made, gates=scores, group=group, curve=curve)

    def edit(self, gates: HeadScores, group: int) -> EvictKeys:
        """The heads that stream by ``gates``, one a query head, at the declared sparsity and sizes in use."""
        known = HeadSet.of(np.argwhere(~np.isnan(gates.mean)), name="streaming")
        streaming = known - full_heads(gates, sparsity=self.sparsity, group=group, seed=self.seed)
        if not len(streaming):
            raise HeadscopeError(f"duo_attention: no head streams at a sparsity of {self.sparsity}; give a higher one")
        budget, options = self.keep_sink + self.keep_recent, {"sink": self.keep_sink}
        return EvictKeys(streaming, policy="streaming_llm", budget=budget, options=options)


@dataclass(frozen=True, kw_only=True, eq=False)
class DuoAttentionResult(Fitted):
    """The edit of the heads that stream, and every gate.

    Attributes:
        gates: of every query head that of its key head (one trial, so without interval). ``to_duo_attention`` writes
            them as the authors do, ``full_heads`` splits them at another sparsity.
        group: query heads of a key head.
        curve: every update's ``loss`` (without the penalty), ``penalty``, ``gradient`` and ``rows``.
    """

    gates: HeadScores
    group: int
    curve: Curve

    def summary(self) -> dict[str, Any]:
        """The heads that stream, the mean gate, the first and last loss."""
        heads = [list(head) for head in self.edit.heads or ()]
        ends = {"loss_first": self.curve[0]["loss"], "loss_last": self.curve[-1]["loss"]}
        return {"heads": heads, "mean_gate": float(np.nanmean(self.gates.mean)), **ends}

    def record(self) -> dict[str, Any]:
        """With the curve, and every gate."""
        return {**super().record(), "gates": self.gates.mean.tolist(), "group": self.group, "curve": self.curve}


@contextmanager
def _streams(
    lm: LanguageModel, policy: StreamingLLM, kept: int
) -> Iterator[tuple[Streams, Callable[[Tokens], Tensor]]]:
    """The handler on the model, and a function from a row to its response's last hidden states (token, d)."""
    streams, seen, model = Streams(policy, kept), list[Tensor](), lm.inner
    hook = model.base_model.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    options: dict[str, Any] = {
        name: value for name, value in {"use_cache": False, "logits_to_keep": 1}.items() if takes(model, name)
    }

    def hidden(row: Tokens) -> Tensor:
        seen.clear()
        lm.model(input_ids=torch.tensor([[*row[0], *row[1]]], device=lm.device), **options)
        return seen[-1][0, len(row[0]) :]

    try:
        with attached(lm, streams, grad=True):
            yield streams, hidden
    finally:
        hook.remove()


def _distillation(
    streams: Streams, hidden: Callable[[Tokens], Tensor], rows: Sequence[Tokens]
) -> Callable[[Sequence[int]], Tensor]:
    """Mean over a batch's response tokens of mean_d (h - h_streaming)^2; gates are cut to [0, 1] first."""

    def loss(batch: Sequence[int]) -> Tensor:
        each = []
        with torch.no_grad():
            for gate in streams.gates.values():
                gate.clamp_(0, 1)
        for i in batch:
            with torch.no_grad():
                streams.streaming = False
                whole = hidden(rows[i])
            streams.streaming = True
            apart = hidden(rows[i]) - whole
            each.append(apart.to(torch.promote_types(apart.dtype, torch.float32)).pow(2).mean(-1))
        return torch.cat(each).mean()

    return loss


def _by_head(table: dict[int, Tensor], shape: tuple[int, int], heads: list[tuple[int, int]]) -> HeadScores:
    """Gates of key heads as scores of query heads; NaN where there is no head."""
    found, counts = np.full(shape, np.nan), {layer: sum(one == layer for one, _ in heads) for layer in table}
    for layer, gates in table.items():
        found[layer, : counts[layer]] = gates.numpy().repeat(counts[layer] // len(gates))
    return HeadScores("duo_attention", found[None], {"unit": "gate", "range": (0.0, 1.0), "source": "arXiv 2410.10819"})
