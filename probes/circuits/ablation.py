"""The model with every node outside of a circuit ablated, many circuits in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.progress import track
from headscope.probes.circuits.circuit import Circuit
from headscope.probes.patching.activation import group_means, numbers
from headscope.probes.patching.pairs import Metric, Pairs, logit_difference, measure
from headscope.probes.patching.places import Change, Place, Places, chunks

Ablation = Literal["mean", "zero", "resample"]


def ablated(
    lm: LanguageModel,
    circuits: Sequence[Circuit],
    pairs: Pairs,
    *,
    ablation: Ablation = "mean",
    metric: Metric = logit_difference,
    batch_size: int = 16,
    together: int = 4,
    progress: bool = True,
) -> NDArray[np.float64]:
    """The metric (circuit, pair) on the clean prompts with every node outside each circuit ablated.

    Raises:
        HeadscopeError: no such ablation, or circuits of which only some have MLPs.
    """
    if ablation not in ("mean", "zero", "resample"):
        raise HeadscopeError(f"ablation is 'mean', 'zero' or 'resample', not {ablation!r}")
    if len({circuit.mlps is None for circuit in circuits}) > 1:
        raise HeadscopeError("some of these circuits have MLPs as nodes and others do not: give one kind")
    sites = ("z",) if circuits[0].mlps is None else ("z", "mlp_out")
    runs, parts = [], pairs.batches(batch_size)
    for part in parts:
        handler = Places(keep=sites)
        measure(lm, part, part.corrupt, handler, metric)
        runs.append((part, handler.kept))
    means = group_means(runs) if ablation == "mean" else {}
    found = []
    for part, kept in track(runs, "ablating", enabled=progress):
        put = {at: _replacement(x, ablation, means.get(at), part) for at, x in kept.items()}
        rows = [
            numbers(measure(lm, part, part.clean, Places(_changes(some, put)), metric, copies=len(some)))
            for some in chunks(circuits, together)
        ]
        found.append(np.concatenate(rows))
    return np.concatenate(found, 1)


def _replacement(x: Tensor, ablation: Ablation, mean: Tensor | None, pairs: Pairs) -> Tensor:
    if ablation == "resample":
        return x
    return torch.zeros_like(x) if mean is None else mean[pairs.groups.to(mean.device)].to(x)


def _changes(circuits: Sequence[Circuit], put: Mapping[Place, Tensor]) -> dict[Place, Change]:
    """Everything outside of each copy's circuit replaced."""
    heads, mlps = (torch.from_numpy(np.stack(x)) for x in zip(*((c.mask, c.mlp_mask) for c in circuits), strict=True))

    def change(given: Tensor, keep: Tensor) -> Change:
        def kept(x: Tensor) -> Tensor:
            copies = x.view(len(circuits), -1, *x.shape[1:])
            inside = keep.to(x.device).view(len(circuits), 1, -1, *[1] * (x.ndim - 2))
            return torch.where(inside, copies, given.to(x)).flatten(0, 1)

        return kept

    return {
        (site, layer): change(given, (heads if site == "z" else mlps)[:, layer]) for (site, layer), given in put.items()
    }
