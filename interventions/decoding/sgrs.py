"""Rejection by saliency: a token is taken only if what was written and asked matters to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.boundary import known_boundary, prompt_boundary
from headscope.interp.prompts.decoding import check_finite, stop_tokens
from headscope.interp.sites import attached
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.gradients import frozen
from headscope.interp.sites.sizes import tower_size
from headscope.interp.sites.unwrap import takes
from headscope.interp.statistics.spans import OPEN, by_example, members, spans_of_example
from headscope.interventions.decoding.base import Decoding
from headscope.interventions.prompts import Prompts, next_positions
from headscope.kernels.saliency import slopes

LAYERS, DEPTH = (6, 7, 8), 32  # the authors', of LLaVA-1.5-7B's


@dataclass(frozen=True)
class Step:
    """How one token was taken.

    Attributes:
        candidates: the most probable tokens, and ``probabilities`` among themselves.
        saliency: S of each.
        threshold: tau, which S had to reach.
        drawn: the candidates drawn, in order; the last one was accepted unless ``fallback``.
        token: what was taken.
        fallback: none that was drawn reached tau, and the candidate of the largest S was taken.
    """

    candidates: tuple[int, ...]
    probabilities: tuple[float, ...]
    saliency: tuple[float, ...]
    threshold: float
    drawn: tuple[int, ...]
    token: int
    fallback: bool


@dataclass(frozen=True)
class Decoded:
    """Generated token ids, their text (None without a tokenizer), and how each was taken."""

    ids: tuple[int, ...]
    text: str | None
    steps: tuple[Step, ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class SaliencyRejection(Decoding):
    """Sample tokens, and reject those whose saliency falls below that of the last ones: SGRS.

    Zhang et al. 2026, "Hallucination Begins Where Saliency Drops" (arXiv 2601.20279, Eq. 6-7; ``do_reject_sample.py``
    of zhangbaijin/LVLMs-Saliency @ 05c0d0d). Of each of the ``candidates`` most probable tokens c, the saliency of a
    layer is |A * dL/dA| averaged over heads, L being the cross-entropy of c where it is predicted, its row brought to
    length 1 over all keys; S(c) is its mean over the keys of J and over ``layers``. J is what stands after the image,
    the instruction and the output so far; 1 for a layer where J is empty. tau is ``alpha`` times the mean S of the last
    ``window`` tokens taken, 0 at first. Up to ``draws`` candidates are drawn without replacement by their
    probabilities; the first with S >= tau is taken, or the candidate of the largest S if none has it.

    The row: the loss is read where c is predicted, at the last row of the text without c, and so is the saliency here
    (``row="predicting"``). The authors read the saliency at c's own row (``row="own"``), on which that loss cannot
    depend: it is 0 for every candidate, tau is 0, and the first draw is always accepted. dL/dA needs no map: it is
    v . dL/dz of the row, in a cached pass of one token and a backward pass a candidate.

    What differs: layers are the authors' 6, 7, 8 of 32 as shares of the depth [OURS]. One text at a time, a batch one
    after the other. Edits may be in force around it, by ``apply(..., grad=True)``; those that keep no gradient
    (``BoostRecent`` without ``renormalise``) refuse.

    What it does not show: that a token of low saliency is untrue; S shrinks with length and with the mass on other
    keys, and a distribution with one likely token leaves nothing to choose.

    Args:
        candidates: K.
        alpha: share of the recent saliency that a token has to reach.
        window: W.
        draws: R.
        layers: L_t; None: the authors', by depth.
        row: "predicting", or "own" as in the authors' code.
        max_new_tokens: tokens at most; a token that ends the text ends it.
        seed: of the draws.
    """

    kind: ClassVar[str] = "sgrs"
    unit: ClassVar[str] = "share of the recent saliency"
    source: ClassVar[str] = "arXiv 2601.20279"

    candidates: int = 5
    alpha: float = 0.6
    window: int = 5
    draws: int = 3
    layers: Sequence[int] | None = None
    row: Literal["predicting", "own"] = "predicting"
    max_new_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        if min(self.candidates, self.window, self.draws, self.max_new_tokens) < 1 or self.alpha < 0:
            raise HeadscopeError("sgrs: candidates, window, draws and max_new_tokens are at least 1, alpha at least 0")
        if self.row not in ("predicting", "own"):
            raise HeadscopeError(f"sgrs: row is 'predicting' or 'own', not {self.row!r}")

    def generate(self, model: ModelLike, inputs: str | Mapping[str, Any], *, span: Any = None) -> Decoded:
        """Continue one text.

        Args:
            inputs: a text, or a model's inputs (``VisionPrompt.inputs``), one example without padding.
            span: J, as statistics take spans (open at the end: ``(first, OPEN)``), or the name of a published one.
                None: all that stands after the published span ``image``.

        Raises:
            HeadscopeError: several examples, padding, no span, or a model without a cache of keys and values.
        """
        lm = load_model(model)
        given = dict(lm.encode(inputs)) if isinstance(inputs, str) else dict(inputs)
        ids = given["input_ids"]
        if ids.shape[0] != 1 or ids.shape[1] < 2 or not bool(given.get("attention_mask", ids.new_ones(1)).all()):
            raise HeadscopeError("sgrs goes on from one text of two tokens or more, without padding")
        kept = _after_image() if span is None else by_example(span)
        rows = _LastRows(self._layers(lm), kept)
        with ExitStack() as stack:
            if known_boundary() is None:
                stack.enter_context(prompt_boundary(int(ids.shape[1])))
            stack.enter_context(frozen(lm))
            named = {layer: f"layer {layer}" for layer in rows.layers}
            stack.enter_context(attached(lm, rows, layers=named, grad=True))
            return self._continue(lm, given, rows)

    def continued(self, model: ModelLike, prompts: Prompts, most: int) -> list[list[int]]:
        """Each prompt by itself, with the same seed."""
        found, own = [], replace(self, max_new_tokens=most)
        for i in range(len(prompts.ids)):
            inputs = prompts.one(i)
            with spans_of_example(i, len(prompts.ids)), prompt_boundary(inputs["input_ids"].shape[1]):
                found.append(list(own.generate(model, inputs).ids))
        return found

    def _layers(self, lm: LanguageModel) -> set[int]:
        depth = tower_size(lm).depth
        return {layer * depth // DEPTH for layer in LAYERS} if self.layers is None else {*map(int, self.layers)}

    def _continue(self, lm: LanguageModel, given: dict[str, Any], rows: _LastRows) -> Decoded:
        draw, stops = torch.Generator().manual_seed(self.seed), stop_tokens(lm)
        text: list[int] = given["input_ids"][0].tolist()
        cache, start, steps = _prefill(lm, given), len(text), list[Step]()
        taken: list[float] = []
        while len(steps) < self.max_new_tokens and not (steps and steps[-1].token in stops):
            before = copy.deepcopy(cache) if self.row == "own" else None
            rows.held.clear()
            logits = _pass(lm, [text[-1]], cache)[0, -1]
            check_finite(lm, logits.detach())
            log_p, top = logits.log_softmax(-1).topk(min(self.candidates, len(logits)))
            if before is None:
                found = [rows.saliency(-one) for one in log_p]
            else:
                found = [self._own(lm, text[-1], int(token), before, rows) for token in top]
            _detach(cache)
            steps.append(self._take(top.tolist(), log_p.detach().double().softmax(-1).cpu(), found, taken, draw))
            taken.append(found[steps[-1].candidates.index(steps[-1].token)])
            text.append(steps[-1].token)
        words = None if lm.tokenizer is None else str(lm.tokenizer.decode(text[start:], skip_special_tokens=True))
        return Decoded(tuple(text[start:]), words, tuple(steps))

    def _own(self, lm: LanguageModel, last: int, token: int, cache: Any, rows: _LastRows) -> float:
        """S at the candidate's own row, of the loss at the row before it."""
        rows.held.clear()
        logits = _pass(lm, [last, token], copy.deepcopy(cache))[0, -2]
        return rows.saliency(-logits.log_softmax(-1)[token])

    def _take(
        self, top: list[int], p: Tensor, saliency: list[float], taken: list[float], draw: torch.Generator
    ) -> Step:
        """The choice among candidates of these probabilities and S, after tokens of S ``taken``."""
        recent = taken[-self.window :]
        threshold = self.alpha * sum(recent) / len(recent) if recent else 0.0
        order = torch.multinomial(p.clamp(min=1e-30), min(self.draws, len(p)), generator=draw).tolist()
        accepted = next((place for place, i in enumerate(order) if saliency[i] >= threshold), None)
        drawn = tuple(top[i] for i in (order if accepted is None else order[: accepted + 1]))
        chosen = max(range(len(top)), key=lambda i: saliency[i]) if accepted is None else order[accepted]
        return Step(tuple(top), tuple(p.tolist()), tuple(saliency), threshold, drawn, top[chosen], accepted is None)


class _LastRows(Handler):
    """Keeps what the saliency of a pass's last row needs: its pattern, the values, and z in the graph."""

    def __init__(self, layers: set[int], span: list[list[tuple[int, int]]]) -> None:
        self.layers, self.span = layers, span
        self.held: dict[int, tuple[Tensor, AttentionCall, Tensor]] = {}

    def concerns(self, module: str, layer: int) -> bool:
        """The layers that are read."""
        return layer in self.layers

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """z itself, as what a gradient can be asked for."""
        if not torch.is_grad_enabled():
            return z
        z = z if z.requires_grad else z.detach().requires_grad_()
        count = call.query.shape[2]
        with torch.no_grad():
            pattern = call.pattern(rows=slice(count - 1, count))[0, :, 0]
        self.held[call.layer] = pattern, call, z
        return z

    def saliency(self, loss: Tensor) -> float:
        """S of the loss that the last pass gave: the mean over the layers."""
        held = list(self.held.values())
        found = torch.autograd.grad(loss, [z for *_, z in held], retain_graph=True, allow_unused=True)
        scores = []
        for (pattern, call, z), gradient in zip(held, found, strict=True):
            at = torch.arange(pattern.shape[-1], device=pattern.device) + call.mask.key_offset
            inside = members(self.span, at[None], 1)[0]
            if not bool(inside.any()):
                scores.append(1.0)
                continue
            g = torch.zeros_like(z[0, :, -1]) if gradient is None else gradient[0, :, -1]
            v = call.value[0].detach()
            slope = slopes(g[None, :, None].to(pattern.dtype), v[None])[0, :, 0]  # dL/dA (head, key)
            row = (pattern * slope).abs().mean(0)
            scores.append(float((row / row.norm().clamp(min=1e-9))[inside].mean()))
        return sum(scores) / len(scores)


def _after_image() -> list[list[tuple[int, int]]]:
    """From the end of the published span ``image`` on."""
    (image,) = by_example("image")
    return [[(max(stop for _, stop in image), OPEN)]]


def _prefill(lm: LanguageModel, given: dict[str, Any]) -> Any:
    """The cache of all but the last token, images included."""
    shape = given["input_ids"].shape
    cut = {n: x[:, :-1] if isinstance(x, Tensor) and x.shape == shape else x for n, x in given.items()}
    with torch.no_grad():
        output = lm.model(
            **{n: x.to(lm.device) if isinstance(x, Tensor) else x for n, x in cut.items()}, use_cache=True
        )
    cache = getattr(output, "past_key_values", None)
    if cache is None or not hasattr(cache, "layers"):
        raise HeadscopeError(f"{lm.name} keeps no cache of keys and values, which sgrs needs; use a causal model")
    return cache


def _pass(lm: LanguageModel, ids: list[int], cache: Any) -> Tensor:
    """Logits (1, token, vocabulary) of tokens that continue a cache, in the graph."""
    mask = torch.ones(1, int(cache.get_seq_length()) + len(ids), dtype=torch.long, device=lm.device)
    tokens = torch.tensor([ids], device=lm.device)
    at = {"position_ids": next_positions(lm, mask, len(ids))} if takes(lm.inner, "position_ids") else {}
    output = lm.model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **at)
    logits: Tensor = output.logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _detach(cache: Any) -> None:
    """Let go of the graph of the last pass."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            if isinstance(getattr(layer, name, None), Tensor):
                setattr(layer, name, getattr(layer, name).detach())
