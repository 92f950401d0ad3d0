"""Accuracies, the progress measures of an induction head, and where and how fast a curve jumps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import one_hot

from headscope.interp.laboratory.abrupt_icl.data import Batch
from headscope.interp.statistics import TargetMass
from headscope.interp.tracing.recording import trace


def accuracy(model: Any, batch: Batch) -> float:
    """Share of sequences whose label gets the largest logit."""
    with torch.no_grad():
        return float((model(batch.tokens).argmax(-1) == batch.label).double().mean())


def context_mass(logits: Tensor, context: Tensor) -> float:
    """CLA: the predicted probability of labels that the context shows, whichever is right, 0 to 1.

    ``logits`` (example, label), ``context`` (example, pair).
    """
    shown = one_hot(context, logits.shape[-1]).amax(1)
    return (logits.softmax(-1) * shown).sum(-1).mean().item()


def progress(model: Any, batch: Batch) -> dict[str, float]:
    """Reddy's progress measures, defined by us after their names [OURS], each 0 to 1, means over sequences.

    With A[query, key] of a layer, pairs n = 0 .. N - 1 and the target in row 2N:
    ``ila1``: mean over n of A1[2n + 1, 2n], what a label gives to its own item. ``tla2``: sum over n of A2[2N, 2n + 1],
    what the target gives to labels. ``tila2``: the same over the pairs whose label is the target's. ``cla``: see
    ``context_mass``.
    """
    pairs = batch.context.shape[1]
    targets: dict[str, Any] = {"before": lambda q: q - 1}
    for n in range(pairs):
        targets[f"label {n}"] = lambda q, n=n: torch.full_like(q, 2 * n + 1)
    with torch.no_grad(), trace(model, [TargetMass(targets)]) as tracer:
        logits = model(batch.tokens)
    mass = tracer.record["target_mass"].isel(head=0)
    before = mass.sel(target="before").isel(layer=0, query=slice(1, None, 2))
    labels = _to(mass.isel(layer=1, query=-1, target=slice(1, None)), ("example", "target"))
    right = (batch.context == batch.label[:, None]).cpu()
    return {
        "ila1": float(before.mean()),
        "tla2": float(labels.sum(-1).mean()),
        "tila2": float((labels * right).sum(-1).mean()),
        "cla": context_mass(logits, batch.context),
    }


def jump(steps: Sequence[float], values: Sequence[float], floor: float = 0.0) -> dict[str, float]:
    """Where a curve rises, between linearly joined points, from its first value or from ``floor``, whichever is higher.

    Returns:
        ``height``: the largest value over that. ``half``: the step at which half of it is first reached, nan for a
        curve that never rises. ``width``: steps from a fifth to four fifths of the height, over ``half``: small for a
        jump, 0.6 / 0.5 = 1.2 for a straight line from step 0.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    start = max(float(y[0]), floor)
    height = float(y.max()) - start
    if height <= 0:
        return {"height": height, "half": float("nan"), "width": float("nan")}
    low, half, high = (_first(x, y, start + share * height) for share in (0.2, 0.5, 0.8))
    return {"height": height, "half": half, "width": (high - low) / half}


def _first(x: np.ndarray, y: np.ndarray, level: float) -> float:
    at = int(np.argmax(y >= level))
    part = (level - y[at - 1]) / (y[at] - y[at - 1])
    return float(x[at - 1] + part * (x[at] - x[at - 1]))


def _to(mass: xr.DataArray, dims: tuple[str, ...]) -> Tensor:
    return torch.from_numpy(mass.transpose(*dims).to_numpy().astype(np.float64))
