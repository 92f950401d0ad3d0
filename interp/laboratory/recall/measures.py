"""What is measured of a model that recalls: answers, and where its heads look while they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headscope.interp.laboratory.recall.task import Recall
from headscope.interp.statistics import Distance, Entropy, SinkMass, TargetMass
from headscope.interp.tracing.recording import trace


def answers(model: nn.Module, task: Recall, ids: Tensor) -> Tensor:
    """Logits of the values at the questions: (count, queries, values)."""
    logits: Tensor = model(ids)[:, -task.queries :, : task.values]
    return logits


def recall_loss(model: nn.Module, task: Recall, drawn: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the values in nats, mean over questions."""
    return cross_entropy(answers(model, task, drawn[0]).flatten(0, 1), drawn[1].flatten())


def measured(model: Any, task: Recall, drawn: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """``loss`` and ``accuracy`` of the answers, and of the patterns at the questions: ``noise``, the mass off the pair
    that is asked for, of the head that has least of it, and ``noise_mean`` over heads; ``sink_mass`` on the first
    token, ``entropy`` (nats) and ``distance`` (tokens), means over heads. Both patterns of a head that is traced as two
    count.

    Where a head takes a share lambda of its second pattern off its first (an attention with ``share``),
    ``noise_difference`` is 1 - (m1 - lambda m2) / (1 - lambda), of the best head: the same of the difference, whose
    weights may be negative.
    """
    ids, values, at = drawn
    targets = torch.full_like(ids, -1)
    targets[:, -task.queries :] = at
    with (
        torch.no_grad(),
        trace(model, [TargetMass({"pair": targets}), SinkMass(first=1), Entropy(), Distance()]) as tracer,
    ):
        logits = answers(model, task, ids)
    record = tracer.record.isel(query=slice(-task.queries, None))
    mass = record["target_mass"].isel(target=0).astype("float64").mean(("example", "query")).transpose("layer", "head")
    found = {
        "loss": float(cross_entropy(logits.flatten(0, 1), values.flatten())),
        "accuracy": float((logits.argmax(-1) == values).double().mean()),
        "noise": 1 - float(mass.max()),
        "noise_mean": 1 - float(mass.mean()),
    }
    found |= {name: float(record[name].mean()) for name in ("sink_mass", "entropy", "distance")}
    if hasattr(model.layers[0].attention, "share"):
        found["noise_difference"] = 1 - max(
            _difference(each, float(layer.attention.share))
            for each, layer in zip(mass.to_numpy(), model.layers, strict=True)
        )
    return found


def _difference(mass: NDArray[np.float64], share: float) -> float:
    """The largest (m1 - share m2) / (1 - share) of the pairs of patterns (head * 2,)."""
    return float((mass[::2] - share * mass[1::2]).max() / (1 - share))
