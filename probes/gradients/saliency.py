"""Saliency of attention: how much a token's loss depends on each weight, |A * dL/dA|, summed without maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import Loadable
from headscope.interp.statistics.spans import by_example, members
from headscope.probes.gradients.backward import Backward, Inputs, backward
from headscope.probes.lenses.targets import Token

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SaliencyReading:
    """A * dL/dA of one prompt, in nats: to first order, what a relative change of a weight changes of the loss. NaN in
    layers and heads that do not attend or were not read. Keys are the prompt's tokens, without padding.

    Attributes:
        keys, signed_keys: (layer, head, key) sums over all queries of |A dL/dA| and of A dL/dA.
        row: (layer, head, key) |A dL/dA| of the row that predicts the target: the "saliency" of Zhang et al.
        spans, signed_spans: (layer, head, span) sums over all queries and the keys of a span.
        names: of the spans.
        loss: cross-entropy of ``target``, a token id, in nats.
    """

    keys: Array
    signed_keys: Array
    row: Array
    spans: Array
    signed_spans: Array
    names: tuple[str, ...]
    loss: float
    target: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def normalised(self) -> Array:
        """Sbar (layer, key): the predicting row's mean over heads, brought to length 1 (L2) over all keys."""
        with np.errstate(invalid="ignore"):
            mean: Array = np.nansum(self.row, 1) / (~np.isnan(self.row)).sum(1)
        found: Array = mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-9)
        return found

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: layer, head, span, saliency (absolute), signed, in nats."""
        layer, head, span = (index.ravel() for index in np.indices(self.spans.shape))
        columns = {"layer": layer, "head": head, "span": np.array(self.names, dtype=object)[span]}
        numbers = {"saliency": self.spans.ravel(), "signed": self.signed_spans.ravel()}
        return pd.DataFrame(columns | numbers).dropna().reset_index(drop=True)


def attention_saliency(
    model: Loadable,
    inputs: Inputs,
    target: Token | None = None,
    *,
    spans: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
) -> SaliencyReading:
    """|A * dL/dA| of every head, L the cross-entropy of ``target`` where it is predicted, after a prompt.

    Zhang et al. 2026, "Hallucination Begins Where Saliency Drops" (arXiv 2601.20279): S = tril(|A . dL/dA|); ``row``
    and ``normalised`` are what their decoding looks at (``interventions``' ``sgrs``). What differs: their figures
    (``demo_step1_llava.py``) multiply the scores before softmax by layer 0's gradient in every layer, which is no
    saliency of that layer; here every layer has its own gradient. No map is built: dL/dA = v . dL/dz, tile by tile.

    What it does not show: a weight's effect where it changes much (a saturated softmax has no gradient, and matters);
    what a change of scores does (rows are not held to sum to 1); anything of MLPs.

    Args:
        model: load_model's result, or what it takes.
        inputs: one text, or a model's inputs of one example (``VisionPrompt.inputs``), padded or not.
        target: the token explained; None: the most probable one. The authors take the first piece of a hallucinated
            word, the text cut just before it.
        spans: of keys, by name, as statistics take them; positions count from the first real token.
        layers: None: all.

    Raises:
        HeadscopeError: several examples; an edit in force that moves mass after softmax.
    """
    lm = load_model(model)
    found = backward(lm, inputs, target, layers)
    named = dict(spans or {})
    count = int(found.real.sum())
    shape = (lm.info.layers, lm.info.heads)
    keys, signed, row = (np.full((*shape, count), np.nan) for _ in range(3))
    by_span, signed_span = (np.full((*shape, len(named)), np.nan) for _ in range(2))
    for layer, one in found.layers.items():
        got, last = one.saliency(list(named.values())), one.saliency(last=found.last)
        heads = got.keys.shape[1]
        for into, x in ((keys, got.keys), (signed, got.signed_keys), (row, last.keys)):
            into[layer, :heads] = x[0, :, found.real.to(x.device)].double().cpu().numpy()
        for into, x in ((by_span, got.spans), (signed_span, got.signed_spans)):
            into[layer, :heads] = x[0].sum(1).double().cpu().numpy()
    made = provenance(lm, target=found.target, spans=list(named)) | {"unit": "nats"}
    return SaliencyReading(keys, signed, row, by_span, signed_span, tuple(named), found.loss, found.target, made)


def saliency_scores(
    model: Loadable,
    prompts: Sequence[Inputs],
    targets: Sequence[Token | None],
    span: Any,
    *,
    progress: bool = True,
) -> HeadScores:
    """Heads by the saliency of a span while a token is predicted: the mean over the span's keys of |A * dL/dA| in the
    row that predicts it, in nats [OURS: the authors average over heads]. A trial is a prompt; one whose span holds no
    key says nothing.

    Args:
        span: of keys, for every prompt alike (``(35, OPEN)``: from token 35 on) or one a prompt.
    """
    lm = load_model(model)
    rows = _by_prompt(span, len(prompts), len(targets))
    trials, details = [], []
    work = list(zip(prompts, targets, rows, strict=True))
    for prompt, target, own in track(work, "saliency", enabled=progress):
        found = backward(lm, prompt, target)
        trials.append(_scores(lm, found, own))
        details.append({"loss": found.loss, "target": found.target})
    made = provenance(lm, spans=rows) | {"unit": "nats"}
    return HeadScores("saliency", np.stack(trials), made, None, tuple(details))


def _scores(lm: LanguageModel, found: Backward, span: Any) -> Array:
    scores = np.full((lm.info.layers, lm.info.heads), np.nan)
    inside = _inside(span, int(found.real.sum()))
    for layer, one in found.layers.items():
        got = one.saliency(last=found.last).keys[0][:, found.real].double().cpu()
        scores[layer, : len(got)] = got[:, inside].mean(1).numpy()
    return scores


def _inside(span: Any, count: int) -> torch.Tensor:
    return members(span, torch.arange(count)[None], 1)[0]


def _by_prompt(span: Any, prompts: int, targets: int) -> list[Any]:
    rows = by_example(span)
    if prompts != targets or not prompts or len(rows) not in (1, prompts):
        raise HeadscopeError(f"give a target and a span (or one for all) to each of {prompts} prompts")
    return [[row] for row in (rows * prompts if len(rows) == 1 else rows)]
