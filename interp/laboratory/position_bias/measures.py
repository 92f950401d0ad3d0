"""Bias gaps and rollout of a trained network, and the paper's table beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headscope.interp.laboratory.position_bias.data import PAIRS_OF_PLACES, Shape, World
from headscope.interp.laboratory.training import generator
from headscope.interp.statistics.rollout import Rollout
from headscope.interp.tracing.recording import trace

CHUNK = 2000  # questions in one pass
READ = 128  # sequences that are traced
TESTS = 2**40  # far from the steps, which draw from the same seed


@dataclass(frozen=True)
class Row:
    """A network of the paper's tables: ``paper`` has its gaps first-middle, first-last, middle-last,
    where it prints any."""

    mask: str
    encoding: str
    depth: int
    residual: bool
    paper: tuple[float, float, float] | None = None

    @property
    def says(self) -> str:
        words = {"none": "no encoding", "sinusoidal": "sinusoidal", "rope": "RoPE"}[self.encoding]
        data = ", residual, answers first or last" if self.residual else ""
        return f"{self.mask} mask, {words}, depth {self.depth}{data}"


# The figures were read in notes on the paper, not in its tables.
TABLE = {
    "causal_2": Row("causal", "none", 2, False, (0.059, 0.077, 0.018)),
    "causal_6": Row("causal", "none", 6, False, (0.091, 0.106, 0.011)),
    "decay_2": Row("decay", "none", 2, False, (-0.055, -0.073, -0.003)),
    "decay_6": Row("decay", "none", 6, False, (0.020, 0.014, -0.010)),
    "rope_2": Row("causal", "rope", 2, False, (0.002, -0.002, -0.009)),
    "rope_6": Row("causal", "rope", 6, False, (0.026, 0.044, 0.017)),
    "residual_full": Row("full", "none", 2, True, (-0.002, 0.000, -0.001)),
    "residual_causal": Row("causal", "none", 2, True, (0.276, 0.308, -0.006)),
    "residual_rope": Row("causal", "rope", 2, True, (0.472, 0.433, -0.241)),
    "window_2": Row("window", "none", 2, False),
    "prefix_2": Row("prefix", "none", 2, False),
    "sinusoidal_2": Row("causal", "sinusoidal", 2, False),
}


def gaps(model: nn.Module, world: World, shape: Shape, questions: int, seed: int) -> dict[str, float]:
    """acc(a_b) - acc(b_a) of the three pairs of places (``first_middle`` and so on), and ``accuracy``, the mean of all
    six tests. Positive: the earlier place is preferred. The standard error of a gap is at most sqrt(0.5 / questions).
    """
    right: dict[tuple[str, str], float] = {}
    for pair in PAIRS_OF_PLACES:
        for a, b in (pair, pair[::-1]):
            right[a, b] = _accuracy(model, world, shape, (shape.place(a), shape.place(b)), questions, seed)
    found = {f"{a}_{b}": right[a, b] - right[b, a] for a, b in PAIRS_OF_PLACES}
    return found | {"accuracy": sum(right.values()) / len(right)}


def _accuracy(
    model: nn.Module, world: World, shape: Shape, places: tuple[int, int], questions: int, seed: int
) -> float:
    device, hits = next(model.parameters()).device, 0
    for first in range(0, questions, CHUNK):
        source = generator(seed, TESTS + first)  # the same questions for every network and pair of places
        x, label = world.question(shape, *places, min(CHUNK, questions - first), source)
        hits += int((model(x.to(device)).argmax(-1).cpu() == label).sum())
    return hits / questions


def rollout(model: nn.Module, world: World, shape: Shape, residual: float, seed: int) -> Tensor:
    """P^t of the query, the last row, traced and averaged over sequences: (layer, position), float64.

    With a residual stream ``residual`` is the share of a layer's input that stays (0.5, attention rollout's; the paper
    has none).
    """
    x, _ = world.batch(shape, READ, generator(seed, TESTS - 1))
    places = {f"{at}": (at, at + 1) for at in range(shape.length)}
    with torch.no_grad(), trace(model, [Rollout(places, residual=residual)]) as tracer:
        model(x.to(next(model.parameters()).device))
    read = tracer.record["rollout"].isel(query=-1, head=0).transpose("example", "layer", "source")
    return torch.tensor(read.to_numpy()).double().mean(0)
