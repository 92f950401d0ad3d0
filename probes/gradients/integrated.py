"""Attribution of attention: integrated gradients from no attention to the model's own, without maps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites import attached
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.gradients import frozen
from headscope.interp.sites.sizes import tower_size
from headscope.interp.sites.unwrap import takes
from headscope.probes.gradients.backward import Outputs
from headscope.probes.lenses.targets import Token, target_pairs


def integrated_attention(
    model: Loadable,
    texts: Sequence[str],
    targets: Sequence[Token],
    *,
    steps: int = 20,
    layers: Sequence[int] | None = None,
    progress: bool = True,
) -> HeadScores:
    """Heads by the sum over queries and keys of their attribution: A * integral over a in [0, 1] of dF(a A)/dA.

    Hao et al. 2021, "Self-Attention Attribution" (arXiv 2004.11207): the weights of one layer at a time go from 0 to
    what they are, all heads together; F is the target's probability after the text. As z = A v, weights times a are
    outputs times a, and dF/dA = v . dF/dz: the sum over a head's weights is z . (the mean over steps of dF/dz), from
    forward and backward passes alone. A layer's heads sum to F - F(no attention there), up to the steps. What differs:
    the integral is taken at the middles of the steps, where it converges faster than at their ends [OURS].

    What it does not show: what one head does while the others attend (they are scaled together), and later layers' own
    part in what the layer's weights change.

    Args:
        model: load_model's result, or what it takes.
        texts: read at their last token.
        targets: one token a text.
        steps: passes for each text and layer.
        layers: None: all.

    Returns:
        Scores in units of probability; a trial is a text.

    Raises:
        HeadscopeError: as ``attention_saliency``.
    """
    lm = load_model(model)
    if steps < 1:
        raise HeadscopeError(f"steps={steps}: integrate over at least one")
    pairs = target_pairs(lm, texts, targets, None)
    chosen = sorted(tower_size(lm).heads or range(lm.info.layers)) if layers is None else list(layers)
    trials = np.full((len(texts), lm.info.layers, lm.info.heads), np.nan)
    work = [(i, layer) for i in range(len(texts)) for layer in chosen]
    for i, layer in track(work, "integrated attention", enabled=progress):
        total: Tensor | None = None
        for step in range(steps):
            z, slope = _pass(lm, texts[i], pairs[i][0], layer, (step + 0.5) / steps)
            total = slope if total is None else total + slope
        assert total is not None
        trials[i, layer, : z.shape[1]] = _summed(z, total / steps)
    made = provenance(lm, prompts=texts, steps=steps) | {"unit": "probability"}
    details = tuple({"example": i, "target": pair} for i, pair in enumerate(pairs))
    return HeadScores("integrated_attention", trials, made, None, details)


def _pass(lm: LanguageModel, text: str, target: int, layer: int, factor: float) -> tuple[Tensor, Tensor]:
    """z of a layer's own weights (1, head, query, d_value), and dF/dz where the weights are times ``factor``."""
    kept = Outputs([layer], (layer, factor))
    given = dict(lm.encode(text))
    options: dict[str, Any] = {"use_cache": False} if takes(lm.inner, "use_cache") else {}
    with ExitStack() as stack:
        stack.enter_context(frozen(lm))
        stack.enter_context(attached(lm, kept, layers={layer: f"layer {layer}"}, grad=True))
        logits = lm.model(**given, **options).logits[0, -1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        lm.check_finite(logits.detach())
        _, z = kept.held[layer]
        (slope,) = torch.autograd.grad(logits.softmax(-1)[target], z)
    return z.detach() / factor, slope


def _summed(z: Tensor, slope: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (z.double() * slope.double()).sum((0, 2, 3)).cpu().numpy()
    return found
