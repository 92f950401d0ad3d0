"""The drop of saliency before a hallucinated token: how far each depends on what was asked and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.look import extended
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import Loadable
from headscope.interp.statistics.spans import OPEN, by_example, members
from headscope.probes.gradients.backward import Backward, Inputs, backward

Array = NDArray[np.float64]
LAYERS, DEPTH = (6, 7, 8), 32  # L_t of the authors, of LLaVA-1.5-7B's
WINDOW = 5  # W: accepted tokens that a token is held against


@dataclass(frozen=True, eq=False)
class SaliencyDrop:
    """Saliency of every read token of an answer.

    Attributes:
        tokens: places in the answer, ascending, and ``texts`` of them.
        layers: (token, layer): the mean over J of the predicting row's saliency, its length brought to 1 over all keys;
            NaN in layers that do not attend.
        chosen: the layers L_t over which ``saliency`` is the mean.
        losses: of each token, in nats.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    layers: Array
    chosen: tuple[int, ...]
    losses: Array
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def saliency(self) -> Array:
        """S of every token: the mean over ``chosen`` layers."""
        return np.asarray(self.layers[:, list(self.chosen)].mean(1))

    @property
    def drop(self) -> Array:
        """S over the mean S of the last five tokens read before it; below 1: a drop; NaN for the first. The authors'
        decoding rejects below 0.6."""
        s = self.saliency
        before = [s[max(0, i - WINDOW) : i] for i in range(len(s))]
        recent = np.array([one.mean() if len(one) else np.nan for one in before])
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(recent > 0, s / recent, np.nan)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: token, text, saliency, drop, loss."""
        columns = {"token": self.tokens, "text": self.texts, "saliency": self.saliency, "drop": self.drop}
        return pd.DataFrame(columns | {"loss": self.losses})


def saliency_drop(
    model: Loadable,
    inputs: Inputs,
    answer: Sequence[int],
    *,
    tokens: Sequence[int] | None = None,
    after: Any = "image",
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> SaliencyDrop:
    """S of the tokens of an answer, each explained where it is predicted, and how far it falls below the last ones.

    Zhang et al. 2026, "Hallucination Begins Where Saliency Drops" (arXiv 2601.20279, Eq. 6): |A dL/dA| averaged over
    heads, L the cross-entropy of the token, in the row that predicts it, brought to length 1 (L2) over all keys, then
    the mean over J, what stands behind the picture: the question and the answer so far, the predicting row included.
    With no key in J it is 1, as in their code. What differs: their released decoding reads the token's own row, on
    which its loss cannot depend, and gives 0 for every token (``row="own"`` of ``interventions``' ``sgrs``); L_t are
    their layers 6, 7, 8 as shares of 32 [OURS]. One backward pass a token; no map is built.

    What it does not show: that a token of low saliency is untrue. S falls with length and with the mass on other keys,
    so compare it with the tokens just before (``drop``), and hallucinated ones with true ones of like place.

    Args:
        model: load_model's result, or what it takes.
        inputs: the prompt: one text, or a model's inputs of one example (``VisionPrompt.inputs``).
        answer: token ids that were generated.
        tokens: which of the answer's, such as the first pieces of its nouns (None: all).
        after: the span behind which J begins: positions, or a published name (``with prompt.published()``).
        layers: L_t.

    Raises:
        HeadscopeError: as ``attention_saliency``; a token that the answer does not have.
    """
    lm = load_model(model)
    given = dict(lm.encode(inputs)) if isinstance(inputs, str) else dict(inputs)
    chosen = sorted({layer * lm.info.layers // DEPTH for layer in LAYERS} if layers is None else set(layers))
    places = range(len(answer)) if tokens is None else sorted(tokens)
    if not places or not 0 <= places[0] <= places[-1] < len(answer):
        raise HeadscopeError(f"tokens={list(places)[:5]} of an answer of {len(answer)}: name places in it")
    rest = [(max((stop for _, stop in by_example(after)[0]), default=0), OPEN)]
    found, losses = [], []
    for at in track(list(places), "saliency", enabled=progress):
        held = backward(lm, extended(given, answer[:at]) if at else given, int(answer[at]))
        found.append(_means(lm, held, [rest]))
        losses.append(held.loss)
    texts = tuple(lm.tokenizer.decode([answer[at]]) if lm.tokenizer is not None else str(answer[at]) for at in places)
    made = provenance(lm, after=rest, layers=chosen) | {"unit": "share of the row's length"}
    return SaliencyDrop(tuple(places), texts, np.stack(found), tuple(chosen), np.array(losses), made)


def _means(lm: LanguageModel, held: Backward, span: Any) -> Array:
    """Of every layer: the mean over the span of the predicting row's normalised saliency."""
    count = int(held.real.sum())
    inside = members(span, torch.arange(count)[None], 1)[0].numpy()
    found = np.full(lm.info.layers, np.nan)
    for layer, one in held.layers.items():
        row = one.saliency(last=held.last).keys[0][:, held.real].double().mean(0).cpu().numpy()
        found[layer] = (row / max(float(np.linalg.norm(row)), 1e-9))[inside].mean() if inside.any() else 1.0
    return found
