"""Whether a circuit carries a behaviour: the model with everything else ablated, beside random circuits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_counts
from headscope.interp.results.bootstrap import percentile_interval, resampled_means
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores
from headscope.probes.circuits.ablation import Ablation, ablated
from headscope.probes.circuits.circuit import Circuit, check_size
from headscope.probes.patching.pairs import Metric, Pairs, logit_difference


@dataclass(frozen=True, eq=False)
class CircuitEvaluation:
    """What ``evaluate_circuit`` found. ``summary`` has a row for faithfulness, the complement and incompleteness with
    their intervals; ``random`` (draw,) are the faithfulness of random circuits, ``nodes`` each node's minimality and
    the ``largest`` found over sets."""

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
    searched: int = 0,
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
    - incompleteness: the mean over ``subsets`` random halves K of the circuit of |F(C without K) - F(all without K)|,
      as a share; 0 where the circuit loses what the model loses. Sizes of what pairs differ by add up, so that it and
      its interval, of these K, lie above 0 in a complete circuit too.
    - minimality of a node v: (F(C) - F(C without v)), as a share, K being empty. Theirs searches a set K for every v,
      as another node may do what v does: ``largest`` is the largest |F(C without K) - F(C without K and v)|, as a
      share, over K empty and the first ``searched`` of the halves, v apart [OURS: theirs are chosen by hand and
      greedily]; the largest of several is above 0 by chance. One run a node and set; ``minimality=False``: none.

    Intervals are a bootstrap over pairs (95 %). A mean over a group of few pairs is little but the pair's own corrupt
    prompt: give several pairs a group. What it does not show: that pairs the circuit was found on are like
    others (evaluate it on others), or anything beyond this ablation; shares above 1 and below 0 happen.

    Raises:
        HeadscopeError: a circuit of another model; ablating everything changes nothing; more sets searched than halves.
    """
    lm = load_model(lm)
    check_counts(0, randoms=randoms, subsets=subsets)
    check_counts(1, together=together)
    if not 0 <= searched <= subsets:
        raise HeadscopeError(f"searched={searched}: search among 0 to subsets={subsets} halves of the circuit")
    check_size([circuit], lm.info.layers, lm.info.heads)
    rng = np.random.default_rng(seed)
    every = circuit.with_heads(np.ones(circuit.size, bool), np.ones(circuit.size[0], bool))
    none = circuit.with_heads(np.zeros(circuit.size, bool), np.zeros(circuit.size[0], bool))
    drawn = [circuit.random(rng) for _ in range(randoms)]
    halves = [_half(circuit, rng) for _ in range(subsets)]
    lost = [_without(circuit, half) for half in halves] + [_without(every, half) for half in halves]
    nodes = _nodes(circuit) if minimality else []
    turned = [_turned(circuit, half, v) for _, v in nodes for half in halves[:searched]]
    asked = [every, none, circuit, _without(every, circuit), *drawn, *lost, *(_without(circuit, v) for _, v in nodes)]
    found = ablated(lm, [*asked, *turned], pairs, ablation=ablation, metric=metric, batch_size=batch_size,
                    together=together, progress=progress)  # fmt: skip
    full, empty, own, rest = found[:4]
    some, missing = found[4 : 4 + randoms], found[4 + randoms : 4 + randoms + 2 * subsets]
    whole = _whole(full, empty)
    rows = [_row("faithfulness", own - empty, full - empty), _row("complement", rest - empty, full - empty)]
    if subsets:
        rows.append(_sizes("incompleteness", missing[:subsets] - missing[subsets:], full - empty))
    without = found[len(asked) - len(nodes) : len(asked)]
    each = [_row(name, own - x, full - empty) for (name, _), x in zip(nodes, without, strict=True)]
    gaps = missing[None, :searched] - found[len(asked) :].reshape(len(nodes), searched, len(pairs))  # (node, set, pair)
    summary = pd.DataFrame(rows, columns=["measure", "value", "ci_low", "ci_high"])
    table = pd.DataFrame(each, columns=["measure", "value", "ci_low", "ci_high"])
    table = table.rename(columns={"measure": "node", "value": "minimality"})
    table["largest"] = np.maximum(
        np.abs(table["minimality"].astype(float)), np.abs(gaps.mean(2) / whole).max(1, initial=0)
    )
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
        HeadscopeError: no sizes, a negative one, or more heads than have a score.
    """
    lm = load_model(lm)
    check_counts(0, randoms=randoms)
    check_counts(1, together=together)
    if not len(sizes):
        raise HeadscopeError("no sizes were given: name at least one number of heads, such as [1, 5, 20]")
    for size in sizes:
        check_counts(0, size=size)
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


def top_circuit(scores: HeadScores, size: int, mlps: NDArray[np.float64] | None = None) -> Circuit:
    """The ``size`` heads of largest magnitude in ``scores``, weighted by their scores; helpers and opponents alike.

    With ``mlps`` (layer,), scores of MLPs, these are nodes and compete with heads."""
    name = f"{scores.method} top {size}"
    if mlps is None:
        magnitude = HeadScores(scores.method, np.abs(scores.mean)[None], scores.provenance)
        chosen, held = list(magnitude.top(size)), None
    else:
        both = np.concatenate([scores.mean, mlps[:, None]], 1)
        order = np.argsort(-np.nan_to_num(np.abs(both), nan=-1.0), axis=None, kind="stable")[:size]
        places = [(int(i) // both.shape[1], int(i) % both.shape[1]) for i in order]
        chosen = [(layer, head) for layer, head in places if head < scores.heads]
        held = tuple(sorted(layer for layer, head in places if head == scores.heads))
    heads = HeadSet(tuple(chosen), tuple(float(scores.mean[pair]) for pair in chosen), name)
    return Circuit(heads, scores.mean.shape, held, (), name, dict(scores.provenance))


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


def _sizes(name: str, parts: NDArray[np.float64], whole: NDArray[np.float64]) -> dict[str, Any]:
    """The mean size of ``parts`` (set, pair), each a mean over pairs, beside that of ``whole``, all drawn together."""
    drawn = resampled_means(np.stack([*parts, whole], 1))
    low, high = percentile_interval(np.abs(drawn[:, :-1]).mean(1) / np.abs(drawn[:, -1]), 0.95)
    value = float(np.abs(parts.mean(1)).mean() / abs(whole.mean()))
    return {"measure": name, "value": value, "ci_low": float(low), "ci_high": float(high)}


def _turned(circuit: Circuit, half: Circuit, node: Circuit) -> Circuit:
    """The circuit without ``half``, in which ``node`` is where it is not."""
    mlps = circuit.mlp_mask & ~(half.mlp_mask ^ node.mlp_mask) if circuit.mlps is not None else None
    return circuit.with_heads(circuit.mask & ~(half.mask ^ node.mask), mlps)


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
