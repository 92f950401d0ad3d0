"""Saliency over a whole text as one picture: as the authors of SGRS describe it, and as their code draws it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.sites.given import Loadable
from headscope.interp.statistics.spans import members
from headscope.kernels.reference import dense_scores
from headscope.kernels.saliency import dense
from headscope.probes.gradients.backward import Inputs, Layer, backward
from headscope.probes.lenses.targets import Token

Array = NDArray[np.float64]
LONGEST = 2048


def saliency_map(
    model: Loadable, inputs: Inputs, target: Token | None = None, *, without: Any = None, reference_bug: bool = False
) -> Array:
    """The picture of their diagnostics, (query, key) in [0, 1]: every layer's |A dL/dA|, mean of heads, brought to
    [0, 1] by its least and largest, summed over layers, log(1 + x), and brought to [0, 1] again.

    ``reference_bug=True`` is what ``demo_step1_llava.py`` of zhangbaijin/LVLMs-Saliency computes: in every layer the
    scores before softmax times A dL/dA *of layer 0*, which is the saliency of no layer; masked scores count as 0. The
    maps are dense: at most 2,048 tokens.

    Args:
        without: a span whose rows and columns are left out (theirs: the picture, ``"image"``).

    Raises:
        HeadscopeError: as ``attention_saliency``; a text too long for dense maps.
    """
    lm = load_model(model)
    held = backward(lm, inputs, target)
    count = int(held.real.sum())
    if count > LONGEST:
        raise HeadscopeError(f"a map of {count} tokens is too large; read attention_saliency, which builds none")
    kept = torch.ones(count, dtype=torch.bool)
    if without is not None:
        kept &= ~members(without, torch.arange(count)[None], 1)[0]
    total = np.zeros((int(kept.sum()),) * 2)
    first = _weighed(held.layers[min(held.layers)])
    for one in held.layers.values():
        w = dense_scores(one.call.inputs()).nan_to_num(neginf=0.0) * first if reference_bug else _weighed(one)
        w = w[0].abs().mean(0)[held.real][:, held.real][kept][:, kept]
        total += _to_one(w.double().cpu().numpy())
    return _to_one(np.log1p(total))


def _weighed(layer: Layer) -> Tensor:
    """A dL/dA (1, head, query, key)."""
    return dense(layer.call.inputs(), layer.call.value, layer.gradient)


def _to_one(x: Array) -> Array:
    spread = float(x.max() - x.min())
    return np.asarray((x - x.min()) / spread if spread > 0 else np.zeros_like(x))
