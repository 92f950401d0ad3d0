"""Vision-aware head reinforcement: the heads that answer most to an image, or to any span, are turned up."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.divergence.context_divergence import ContextDivergence, above_median, outliers
from headscope.interp.heads.passes import record_of
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample
from headscope.interp.prompts.vision import VisionPrompt
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites.given import ModelLike
from headscope.interp.statistics import Statistic
from headscope.interventions.applying import apply
from headscope.interventions.outputs.scale import ScaleHeads

TextStream = Literal["reinforced", "plain"]


def reinforced_heads(
    model: ModelLike,
    prompt: VisionPrompt,
    *,
    span: str = "image",
    layers: Iterable[int] | None = None,
    factor: float = 2.0,
    zero_outliers: bool = True,
    text_stream: TextStream = "reinforced",
) -> ScaleHeads:
    """The edit that VHR makes of one prompt: ``factor`` times z of the heads above their layer's median divergence.

    He et al. 2025 (arXiv 2412.13949, Algorithm 1; no code is to be had). Layer by layer, upwards, with the heads chosen
    so far reinforced already: a head's divergence (VHD) is the norm of its z at the prompt's last position minus that
    without ``span``; outliers are set to 0 (``ContextDivergence``); those strictly above the layer's median are chosen.
    What is returned scales them at all positions from the prompt on, and is fixed for the response: it is a
    ``ScaleHeads`` for this prompt, to be made again for another.

    [OURS], where the paper is silent: the prompt without the span is reinforced in earlier layers too
    (``text_stream="plain"``: it is not; the choice of heads differs), and layers are named as shares of the depth: the
    second and the last 14 of 32. Every layer takes two forward passes, where the authors run both streams at once.

    What it does not show: that the heads use what the span says.

    Args:
        model: load_model's result.
        prompt: one chat with named spans, as ``vision_prompt`` makes them (with images or without).
        span: what is taken out; any that the prompt names.
        layers: those in which heads are reinforced.
        factor: the paper's alpha.
        zero_outliers: the paper's rule; False is its ablation.

    Raises:
        HeadscopeError: no such span or layer, or no head above its layer's median.
    """
    lm = load_model(model)
    if text_stream not in ("reinforced", "plain"):
        raise HeadscopeError(f"text_stream must be 'reinforced' or 'plain', not {text_stream!r}")
    depth = lm.info.layers
    chosen = {1, *range(depth - round(depth * 14 / 32), depth)} if layers is None else set(layers)
    if not chosen or not chosen <= set(range(depth)):
        raise HeadscopeError(f"layers {sorted(chosen)} are not among 0-{depth - 1}; name those to reinforce")
    whole, rest = ContextDivergence(prompts=[prompt], span=span).contexts(lm)[0]
    statistics = ContextDivergence(span=span).statistics([whole])
    heads: list[tuple[int, int]] = []

    def z(sample: Sample, layer: int, edited: bool) -> NDArray[np.float64]:
        return _z(
            lm, sample, layer, ScaleHeads(HeadSet(tuple(heads)), factor) if heads and edited else None, statistics
        )

    for layer in sorted(chosen):
        plain = z(rest, layer, text_stream == "reinforced")
        moved = np.linalg.norm(z(whole, layer, True) - plain, axis=-1)[None]  # (layer, head), as the rules take it
        size = (plain**2).sum(-1)[None]
        kept = np.where(outliers(moved, size), 0.0, moved) if zero_outliers else moved
        heads += [(layer, int(head)) for head in np.flatnonzero(above_median(kept)[0])]
    if not heads:
        raise HeadscopeError(f"no head of layers {sorted(chosen)} answers to the span {span!r} more than another")
    return ScaleHeads(HeadSet(tuple(heads), name="reinforced"), factor)


def _z(
    lm: LanguageModel, sample: Sample, layer: int, edit: ScaleHeads | None, statistics: list[Statistic]
) -> NDArray[np.float64]:
    """z (head, d_head) of one layer at the last position."""
    with ExitStack() as stack:
        if edit is not None:
            stack.enter_context(apply(lm, edit))
        record = record_of(lm, [sample], statistics)
    z = record["z"].sel(layer=layer).isel(example=0, position=-1).transpose("head", "d_head")
    return np.asarray(z.to_numpy(), dtype=np.float64)
