"""Whether a circuit carries a behaviour: the model with everything else ablated, beside random circuits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.bootstrap import percentile_interval, resampled_means
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.progress import track
from headscope.probes.circuits.circuit import Circuit, check_size
from headscope.probes.patching.activation import group_means, numbers
from headscope.probes.patching.pairs import Metric, Pairs, logit_difference, measure
from headscope.probes.patching.places import Change, Place, Places, chunks

Ablation = Literal["mean", "zero", "resample"]


@dataclass(frozen=True, eq=False)
class CircuitEvaluation:
    """What ``evaluate_circuit`` found. ``summary`` has a row for faithfulness, the complement and incompleteness with
    their intervals; ``random`` (draw,) are the faithfulness of random circuits, ``nodes`` each node's minimality."""

    summary: pd.DataFrame
    random: NDArray[np.float64]
    nodes: pd.DataFrame
    ablation: Ablation
    metric: Mapping[str, float]

    @property
    def p(self) -> float:
        """The share of random circuits at least as faithful, this one counted."""
        own = float(self.summary.set_index("measure").loc["faithfulness", "value"])
        return float((1 + (self.random >= own).sum()) / (1 + len(self.random)))

    def document(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "ablation": self.ablation,
            "metric": dict(self.metric),
            "summary": _records(self.summary),
            "random": {
                "n": len(self.random),
                "mean": _mean(self.random),
                "highest": _highest(self.random),
                "p": self.p,
            },
            "nodes": _records(self.nodes),
        }


def evaluate_circuit(
    lm: LanguageModel,
    circuit: Circuit,
    pairs: Pairs,
    *,
    ablation: Ablation = "mean",
    randoms: int = 20,
    subsets: int = 10,
    minimality: bool = True,
    metric: Metric = logit_difference,
    batch_size: int = 16,
    together: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> CircuitEvaluation:
    """Faithfulness, completeness and minimality of a circuit (Wang et al. 2022, arXiv 2211.00593, Section 4).

    F(N) is the mean metric on the clean prompts with every node outside N ablated at all positions: by the mean of the
    corrupt prompts of its group at the same position (``"mean"``, theirs), by zero, or by its value in the pair's own
    corrupt prompt (``"resample"``: an interchange). Nodes are heads, and MLPs where the circuit has any.

    - faithfulness: (F(C) - F(none)) / (F(all) - F(none)), 1 where the circuit does what the model does (Marks et al.
      2024, arXiv 2403.19647; Wang et al. report |F(all) - F(C)|); ``random``: the same of circuits with as many nodes
      in every layer.
    - complement: the same for all nodes but the circuit's, 0 where nothing outside does it as well.
    - incompleteness: the mean over random halves K of the circuit of |F(C without K) - F(all without K)|, as a share; 0
      where the circuit loses what the model loses.
    - minimality of a node v: (F(C) - F(C without v)), as a share. Theirs searches a set K for every v; K is empty here.
      One run a node; ``minimality=False`` leaves it out.

    Intervals are a bootstrap over pairs (95 %). A mean over a group of few pairs is little but the pair's own corrupt
    prompt: give several pairs a group. What it does not show: that pairs the circuit was found on are like
    others (evaluate it on others), or anything beyond this ablation; shares above 1 and below 0 happen.

    Raises:
        HeadscopeError: a circuit of another model; ablating everything changes nothing.
    """
    lm = load_model(lm)
    check_size([circuit], lm.info.layers, lm.info.heads)
    rng = np.random.default_rng(seed)
    every = circuit.with_heads(np.ones(circuit.size, bool), np.ones(circuit.size[0], bool))
    none = circuit.with_heads(np.zeros(circuit.size, bool), np.zeros(circuit.size[0], bool))
    drawn = [circuit.random(rng) for _ in range(randoms)]
    halves = [_half(circuit, rng) for _ in range(subsets)]
    lost = [_without(circuit, half) for half in halves] + [_without(every, half) for half in halves]
    nodes = _nodes(circuit) if minimality else []
    asked = [every, none, circuit, _without(every, circuit), *drawn, *lost, *(_without(circuit, v) for _, v in nodes)]
    found = ablated(lm, asked, pairs, ablation=ablation, metric=metric, batch_size=batch_size, together=together,
                    progress=progress)  # fmt: skip
    full, empty, own, rest = found[:4]
    some, missing = found[4 : 4 + randoms], found[4 + randoms : 4 + randoms + 2 * subsets]
    gaps = np.abs(missing[:subsets].mean(1) - missing[subsets:].mean(1))
    whole = _whole(full, empty)
    rows = [_row("faithfulness", own - empty, full - empty), _row("complement", rest - empty, full - empty)]
    if subsets:
        rows.append({"measure": "incompleteness", "value": float(gaps.mean() / abs(whole))})
    each = [
        _row(name, own - without, full - empty)
        for (name, _), without in zip(nodes, found[len(found) - len(nodes) :], strict=True)
    ]
    summary = pd.DataFrame(rows, columns=["measure", "value", "ci_low", "ci_high"])
    table = pd.DataFrame(each, columns=["measure", "value", "ci_low", "ci_high"])
    table = table.rename(columns={"measure": "node", "value": "minimality"})
    means = {"all": float(full.mean()), "none": float(empty.mean()), "circuit": float(own.mean())}
    return CircuitEvaluation(summary, (some - empty).mean(1) / whole, table, ablation, means)


def faithfulness_curve(
    lm: LanguageModel,
    scores: HeadScores,
    pairs: Pairs,
    sizes: Sequence[int],
    *,
    ablation: Ablation = "mean",
    randoms: int = 10,
    metric: Metric = logit_difference,
    batch_size: int = 16,
    together: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Faithfulness of the heads of largest magnitude in ``scores``, over their number, beside random circuits.

    Returns:
        columns ``size``, ``faithfulness``, ``ci_low``, ``ci_high``, ``random`` (mean of random circuits with as many
        heads in every layer), ``random_low`` and ``random_high`` (their lowest and highest).

    Raises:
        HeadscopeError: more heads than have a score.
    """
    lm = load_model(lm)
    circuits = [top_circuit(scores, size) for size in sizes]
    rng = np.random.default_rng(seed)
    drawn = [circuit.random(rng) for circuit in circuits for _ in range(randoms)]
    ends = [circuits[0].with_heads(np.full(circuits[0].size, held)) for held in (True, False)]
    found = ablated(lm, [*ends, *circuits, *drawn], pairs, ablation=ablation, metric=metric, batch_size=batch_size,
                    together=together, progress=progress)  # fmt: skip
    full, empty, rest = found[0], found[1], found[2 + len(sizes) :]
    rows = []
    for i, size in enumerate(sizes):
        row = _row("faithfulness", found[2 + i] - empty, full - empty)
        random = (rest[i * randoms : (i + 1) * randoms] - empty).mean(1) / _whole(full, empty)
        rows.append(
            {"size": size, "faithfulness": row["value"], "ci_low": row["ci_low"], "ci_high": row["ci_high"],
             "random": _mean(random), "random_low": _mean(random.min(keepdims=True)), "random_high": _highest(random)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def top_circuit(scores: HeadScores, size: int) -> Circuit:
    """The ``size`` heads of largest magnitude in ``scores``, weighted by their scores; helpers and opponents alike."""
    magnitude = HeadScores(scores.method, np.abs(scores.mean)[None], scores.provenance)
    heads = magnitude.top(size)
    weighted = type(heads)(
        heads.heads, tuple(float(scores.mean[pair]) for pair in heads), f"{scores.method} top {size}"
    )
    return Circuit(weighted, scores.mean.shape, None, (), weighted.name, dict(scores.provenance))


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


def _whole(full: NDArray[np.float64], empty: NDArray[np.float64]) -> float:
    whole = float((full - empty).mean())
    if abs(whole) < 1e-6 * max(1.0, float(np.abs(full).max())):
        raise HeadscopeError("the metric is the same with every node ablated, so a circuit has nothing to carry here")
    return whole


def _row(name: str, part: NDArray[np.float64], whole: NDArray[np.float64]) -> dict[str, Any]:
    """A ratio of means over pairs with its bootstrap interval, both drawn together."""
    _whole(whole, np.zeros_like(whole))
    drawn = resampled_means(np.stack([part, whole], 1))
    low, high = percentile_interval(drawn[:, 0] / drawn[:, 1], 0.95)
    return {"measure": name, "value": float(part.mean() / whole.mean()), "ci_low": float(low), "ci_high": float(high)}


def _without(circuit: Circuit, other: Circuit) -> Circuit:
    mlps = circuit.mlp_mask & ~other.mlp_mask if circuit.mlps is not None else None
    return circuit.with_heads(circuit.mask & ~other.mask, mlps)


def _half(circuit: Circuit, rng: np.random.Generator) -> Circuit:
    drawn = rng.random(circuit.size) < 0.5, rng.random(circuit.size[0]) < 0.5
    return circuit.with_heads(circuit.mask & drawn[0], circuit.mlp_mask & drawn[1])


def _nodes(circuit: Circuit) -> list[tuple[str, Circuit]]:
    """Each node alone, by name."""

    def alone(layer: int, head: int | None) -> Circuit:
        heads, mlps = np.zeros(circuit.size, bool), np.zeros(circuit.size[0], bool)
        if head is None:
            mlps[layer] = True
        else:
            heads[layer, head] = True
        return circuit.with_heads(heads, mlps)

    found = [(f"L{layer}H{head}", alone(layer, head)) for layer, head in circuit.heads]
    return found + [(f"L{layer}MLP", alone(layer, None)) for layer in circuit.mlps or ()]


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON, None where there is no number."""
    rows: list[dict[str, Any]] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return rows


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _highest(values: NDArray[np.float64]) -> float:
    return float(values.max()) if len(values) else float("nan")
