"""Finding a circuit: the nodes of most effect, by attribution or along paths, and the edges among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_counts
from headscope.interp.results.headset import HeadSet
from headscope.interp.runs.files import folder_of
from headscope.interp.runs.journal import Journal
from headscope.interp.runs.loop import opened
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import describe, fingerprint, provenance
from headscope.probes.circuits.circuit import Circuit, Edge
from headscope.probes.circuits.evaluation import top_circuit
from headscope.probes.patching.attribution import attribution_patching
from headscope.probes.patching.nodes import LOGITS, Node
from headscope.probes.patching.pairs import Metric, Pairs, logit_difference, share
from headscope.probes.patching.path import Stage
from headscope.probes.patching.places import chunks

READS = ("q", "k", "v")


def find_circuit(
    lm: LanguageModel,
    pairs: Pairs,
    size: int = 20,
    method: Literal["attribution", "path"] = "attribution",
    *,
    mlps: bool = False,
    budget: int = 2000,
    threshold: float = 0.02,
    metric: Metric = logit_difference,
    batch_size: int = 16,
    together: int = 8,
    out: str | Path | None = None,
    progress: bool = True,
) -> Circuit:
    """The circuit of at most ``size`` heads (and MLPs) for what ``pairs`` differ in.

    ``"attribution"``: the nodes of largest magnitude under ``attribution_patching`` of z (three passes). ``"path"``, as
    Wang et al. 2022 go back from the answer: from the logits, the nodes that move it most by a direct path are taken
    in, then those that move it most through the q, k or v of these, or through the MLPs among them, strongest receivers
    first, until there are ``size`` nodes or the ``budget`` is spent. Each receiver is measured alone, at all positions
    at once [OURS: the authors go by stages of several receivers, at positions chosen by hand], so that every edge is a
    number of its own. Without ``mlps``, MLPs are no nodes: they carry what they are given, and a path through them
    counts as direct; with them they are held where they are no sender.

    The edges of an ``"attribution"`` circuit are measured by ``measure_edges``. What a search does not show: that the
    circuit suffices; ``evaluate_circuit`` on other pairs does.

    Args:
        mlps: MLPs are nodes like heads.
        budget: forward passes over the pairs for "path", two for each sender and receiver; ``provenance`` says how many
            were spent, and whether the budget ended the search.
        threshold: the smallest magnitude of an edge, a share of the difference.
        out: file to which a search by "path" writes what it measured at each receiver, and from which a killed one
            goes on.

    Raises:
        HeadscopeError: another method, a size that is no number of nodes, no node that has an effect, or a file of
            another run.
    """
    out, lm = folder_of(out), load_model(lm)
    if method not in ("attribution", "path"):
        raise HeadscopeError(f"method is 'attribution' or 'path', not {method!r}")
    check_counts(1, together=together)
    every = lm.info.layers * (lm.info.heads + mlps)
    if not 0 < size <= every:
        raise HeadscopeError(f"size={size}: choose 1 to {every} {'nodes' if mlps else 'heads'}")
    if method == "attribution":
        found = attribution_patching(lm, pairs, mlps=mlps, metric=metric, batch_size=batch_size, progress=progress)
        added = None if found.mlps is None else found.mlps.mean(0)
        circuit = top_circuit(found.scores, size, added)
        spent = {"method": method, "passes": found.forwards + found.backwards}
        return replace(circuit, provenance={**circuit.provenance, **spent})
    settings: dict[str, Any] = {"size": size, "budget": budget, "threshold": threshold, "mlps": mlps}
    made = provenance(lm, prompts=pairs.texts, **settings) | {"method": "path"}
    config: dict[str, Any] = {}
    if out is not None:
        config = {name: made[name] for name in ("model", "parameters", "prompts_sha256", "method")}
        config |= {"weights": fingerprint(lm.inner), "metric": describe(metric), "batch_size": batch_size}
        config |= {"answers": describe([pairs.answers, pairs.others]), "together": together}
    with opened(out, config) as journal:
        search = _Search(lm, pairs, size, budget, threshold, metric, batch_size, together, mlps, journal)
        return search.circuit(made, progress)


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
    """The circuit with the direct effect of each of its heads on each later one's q, k and v, and on the logits; of its
    MLPs, and on them, where they are nodes.

    Args:
        threshold: edges of a smaller magnitude are left out.
        budget: forward passes over the pairs; highest receivers come first, and ``provenance`` says if it ended.
    """
    lm = load_model(lm)
    held = circuit.mlps is not None
    nodes = [Node(*pair) for pair in circuit.heads] + [Node(layer) for layer in circuit.mlps or ()]
    nodes.sort(key=lambda node: node.order)
    readers = [None, *(read for node in reversed(nodes) for read in _reads(node))]
    edges: list[Edge] = []
    spent, ended = 0, False
    for receiver in track(readers, "edges", enabled=progress):
        senders = [node for node in nodes if receiver is None or node.order < receiver.order]
        if not senders:
            continue
        if ended := spent + 2 * len(senders) > budget:
            break
        spent += 2 * len(senders)
        effects = direct_effects(lm, pairs, receiver, senders, metric, batch_size, together, held)
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
    held: bool = False,
) -> NDArray[np.float64]:
    """The share of the difference that each sender moves through one receiver (None: the logits): (sender,). ``held``:
    MLPs that do not send keep their clean outputs."""
    found, base, other = [], [], []
    for part in pairs.batches(batch_size):
        stage = Stage(lm, part, [] if receiver is None else [receiver], None, held, metric)
        rows = [row for some in chunks(senders, together) for row in stage.effects([[node] for node in some])]
        found.append(np.stack(rows, 1))
        base.append(stage.runs.base)
        other.append(stage.runs.other)
    effects = share(np.concatenate(found), np.concatenate(base), np.concatenate(other), normalize=True)
    mean: NDArray[np.float64] = effects.mean(0)
    return mean


@dataclass(eq=False)
class _Search:
    """A search along paths: the nodes taken in and their ``strength``, and the ``edges`` that led to them."""

    lm: LanguageModel
    pairs: Pairs
    size: int
    budget: int
    threshold: float
    metric: Metric
    batch_size: int
    together: int
    mlps: bool
    journal: Journal
    strength: dict[Node, float] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    spent: int = 0
    asked: int = 0
    ended: bool = False

    def circuit(self, made: dict[str, Any], progress: bool) -> Circuit:
        """Search, strongest receivers first.

        Raises:
            HeadscopeError: nothing moves the answer.
        """
        waiting: list[tuple[float, Node | None]] = [(1.0, None)]
        for _ in track(range(self.size + 1), "path search", enabled=progress):
            if not waiting or len(self.strength) >= self.size or self.ended:
                break
            waiting.sort(key=lambda x: x[0])
            weight, receiver = waiting.pop()
            for read in [None] if receiver is None else _reads(receiver):
                fresh = self._measured(read)
                waiting += [(weight * abs(self.strength[node]), node) for node in self._taken(fresh)]
        layers, width = self.lm.info.layers, self.lm.info.heads
        if not self.strength:
            raise HeadscopeError(
                f"no node moves the answer by {self.threshold} of the difference within {self.budget} passes: raise "
                f"the budget, which one receiver needs {2 * layers * (width + self.mlps)} of, or lower the threshold"
            )
        heads = {(n.layer, n.head): weight for n, weight in self.strength.items() if n.head is not None}
        held = HeadSet(tuple(heads), tuple(heads.values()), "path patching")
        found = tuple(sorted(n.layer for n in self.strength if n.head is None)) if self.mlps else None
        made = {**made, "passes": self.spent, "ended": self.ended}
        return Circuit(held, (layers, width), found, tuple(self.edges), "path patching", made)

    def _measured(self, read: Node | None) -> list[Edge]:
        """The edges of one receiver, strongest first; none where the budget is spent."""
        every = [Node(n, h) for n in range(self.lm.info.layers) for h in range(self.lm.info.heads)]
        every += [Node(n) for n in range(self.lm.info.layers)] if self.mlps else []
        senders = [node for node in every if read is None or node.order < read.order]
        self.ended = self.ended or self.spent + 2 * len(senders) > self.budget
        if not senders or self.ended:
            return []
        self.spent += 2 * len(senders)
        if self.asked not in self.journal:
            effects = direct_effects(
                self.lm, self.pairs, read, senders, self.metric, self.batch_size, self.together, self.mlps
            )
            self.journal.add(self.asked, {"receiver": str(read or LOGITS), "effects": effects.tolist()})
        known = np.asarray(self.journal.entries[self.asked]["effects"], dtype=np.float64)
        self.asked += 1
        return sorted(_edges(senders, read, known, self.threshold), key=lambda e: -abs(e.weight))

    def _taken(self, fresh: list[Edge]) -> list[Node]:
        """Take the senders of new edges in while there is room, and keep the edges of those that are in."""
        new = []
        for edge in fresh:
            node = Node.of(edge.sender)
            if node not in self.strength and len(self.strength) < self.size:
                self.strength[node] = edge.weight
                new.append(node)
            if node in self.strength:
                self.edges.append(edge)
        return new


def _reads(node: Node) -> list[Node]:
    """What a node reads with: a head's q, k and v, or an MLP."""
    if node.head is None:
        return [replace(node, component="mlp_out")]
    return [replace(node, component=component) for component in READS]


def _edges(
    senders: Sequence[Node], receiver: Node | None, effects: NDArray[np.float64], threshold: float
) -> list[Edge]:
    name = LOGITS if receiver is None else str(receiver)
    return [
        Edge(str(node), name, float(effect))
        for node, effect in zip(senders, effects, strict=True)
        if abs(effect) >= threshold
    ]
