"""Finding a circuit: the heads of most effect, by attribution or along paths, and the edges among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.probes.circuits.circuit import Circuit, Edge
from headscope.probes.circuits.evaluation import top_circuit
from headscope.probes.patching.attribution import attribution_patching
from headscope.probes.patching.pairs import Metric, Pairs, logit_difference, share
from headscope.probes.patching.path import LOGITS, Node, Stage
from headscope.probes.patching.places import chunks

READS = ("q", "k", "v")


def find_circuit(
    lm: LanguageModel,
    pairs: Pairs,
    size: int = 20,
    method: Literal["attribution", "path"] = "attribution",
    *,
    budget: int = 2000,
    threshold: float = 0.02,
    metric: Metric = logit_difference,
    batch_size: int = 16,
    together: int = 8,
    progress: bool = True,
) -> Circuit:
    """The circuit of at most ``size`` heads for what ``pairs`` differ in.

    ``"attribution"``: the heads of largest magnitude under ``attribution_patching`` of z (three passes). ``"path"``, as
    Wang et al. 2022 go back from the answer: from the logits, the heads that move it most by a direct path are taken
    in, then those that move it most through the q, k or v of these, strongest receivers first, until there are ``size``
    heads or the ``budget`` is spent. Each receiver is measured alone, at all positions at once [OURS: the authors go by
    stages of several receivers, at positions chosen by hand], so that every edge is a number of its own.

    The edges of an ``"attribution"`` circuit are measured by ``measure_edges``. What a search does not show: that the
    circuit suffices; ``evaluate_circuit`` on other pairs does.

    Args:
        budget: forward passes over the pairs for "path", two for each sender and receiver; ``provenance`` says how many
            were spent, and whether the budget ended the search.
        threshold: the smallest magnitude of an edge, a share of the difference.

    Raises:
        HeadscopeError: another method, a size that is no number of heads, or no head that has an effect.
    """
    lm = load_model(lm)
    if method not in ("attribution", "path"):
        raise HeadscopeError(f"method is 'attribution' or 'path', not {method!r}")
    if method == "attribution":
        found = attribution_patching(lm, pairs, metric=metric, batch_size=batch_size, progress=progress)
        circuit = top_circuit(found.scores, size)
        spent = {"method": method, "passes": found.forwards + found.backwards}
        return replace(circuit, provenance={**circuit.provenance, **spent})
    return _along_paths(lm, pairs, size, budget, threshold, metric, batch_size, together, progress)


def measure_edges(
    lm: LanguageModel,
    pairs: Pairs,
    circuit: Circuit,
    *,
    threshold: float = 0.02,
    budget: int = 4000,
    metric: Metric = logit_difference,
    batch_size: int = 16,
    together: int = 8,
    progress: bool = True,
) -> Circuit:
    """The circuit with the direct effect of each of its heads on each later one's q, k and v, and on the logits.

    Args:
        threshold: edges of a smaller magnitude are left out.
        budget: forward passes over the pairs; highest receivers come first, and ``provenance`` says if it ended.
    """
    lm = load_model(lm)
    heads = sorted(Node(*pair) for pair in circuit.heads)
    readers: list[Node | None] = [None, *(replace(n, component=c) for n in reversed(heads) for c in READS)]
    edges: list[Edge] = []
    spent, ended = 0, False
    for receiver in track(readers, "edges", enabled=progress):
        senders = [node for node in heads if receiver is None or node.layer < receiver.layer]
        if not senders:
            continue
        if ended := spent + 2 * len(senders) > budget:
            break
        spent += 2 * len(senders)
        effects = direct_effects(lm, pairs, receiver, senders, metric, batch_size, together)
        edges += _edges(senders, receiver, effects, threshold)
    return replace(
        circuit, edges=tuple(edges), provenance={**circuit.provenance, "edge_passes": spent, "edges_ended": ended}
    )


def direct_effects(
    lm: LanguageModel,
    pairs: Pairs,
    receiver: Node | None,
    senders: Sequence[Node],
    metric: Metric = logit_difference,
    batch_size: int = 16,
    together: int = 8,
) -> NDArray[np.float64]:
    """The share of the difference that each sender moves through one receiver (None: the logits): (sender,)."""
    found, base, other = [], [], []
    for part in pairs.batches(batch_size):
        stage = Stage(lm, part, [] if receiver is None else [receiver], None, False, metric)
        rows = [row for some in chunks(senders, together) for row in stage.effects([[node] for node in some])]
        found.append(np.stack(rows, 1))
        base.append(stage.runs.base)
        other.append(stage.runs.other)
    effects = share(np.concatenate(found), np.concatenate(base), np.concatenate(other), normalize=True)
    mean: NDArray[np.float64] = effects.mean(0)
    return mean


def _along_paths(
    lm: LanguageModel, pairs: Pairs, size: int, budget: int, threshold: float, metric: Metric, batch_size: int,
    together: int, progress: bool,
) -> Circuit:  # fmt: skip
    layers, width = lm.info.layers, lm.info.heads
    if not 0 < size <= layers * width:
        raise HeadscopeError(f"size={size}: choose 1 to {layers * width} heads")
    strength: dict[Node, float] = {}
    edges: list[Edge] = []
    waiting: list[tuple[float, Node | None]] = [(1.0, None)]
    spent, ended = 0, False
    while waiting and len(strength) < size and not ended:
        waiting.sort(key=lambda x: x[0])
        weight, receiver = waiting.pop()
        reads = [None] if receiver is None else [replace(receiver, component=c) for c in READS]
        for read in reads:
            senders = [Node(n, h) for n in range(layers if read is None else read.layer) for h in range(width)]
            if not senders or (ended := spent + 2 * len(senders) > budget):
                break
            spent += 2 * len(senders)
            effects = direct_effects(lm, pairs, read, senders, metric, batch_size, together)
            fresh = _edges(senders, read, effects, threshold)
            for edge in sorted(fresh, key=lambda e: -abs(e.weight)):
                node = Node.of(edge.sender)
                if node not in strength and len(strength) < size:
                    strength[node] = edge.weight
                    waiting.append((weight * abs(edge.weight), node))
                if node in strength:
                    edges.append(edge)
    if not strength:
        raise HeadscopeError(
            f"no head moves the answer by {threshold} of the difference within {budget} passes: raise the budget, "
            f"which one receiver needs {2 * layers * width} of, or lower the threshold"
        )
    heads = HeadSet(tuple((n.layer, n.head or 0) for n in strength), tuple(strength.values()), "path patching")
    settings: dict[str, Any] = {"size": size, "budget": budget, "threshold": threshold}
    made = provenance(lm, prompts=pairs.texts, **settings) | {"method": "path", "passes": spent, "ended": ended}
    return Circuit(heads, (layers, width), None, tuple(edges), "path patching", made)


def _edges(
    senders: Sequence[Node], receiver: Node | None, effects: NDArray[np.float64], threshold: float
) -> list[Edge]:
    name = LOGITS if receiver is None else str(receiver)
    return [
        Edge(str(node), name, float(effect))
        for node, effect in zip(senders, effects, strict=True)
        if abs(effect) >= threshold
    ]
