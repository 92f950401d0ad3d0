"""Attribution patching of edges: what each sender does to the answer through each receiver alone, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_counts
from headscope.interp.results.bootstrap import bootstrap_mean
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.probes.patching.activation import UNIT, Direction
from headscope.probes.patching.edge_gradients import EMBEDDING, first_order
from headscope.probes.patching.nodes import LOGITS, Node, receivers_of
from headscope.probes.patching.pairs import Metric, Pairs, logit_difference, share
from headscope.probes.patching.path import Stage


@dataclass(frozen=True, eq=False, repr=False)
class EdgeAttribution:
    """``values`` (pair, sender, receiver): the estimated effect of every edge, NaN where there is none.

    ``senders``: ``embedding``, heads (``L0H1``), MLPs (``L0MLP``). ``receivers``: a head's ``L3H2.q``, ``.k``, ``.v``,
    MLPs, and ``logits``, the stream behind the last layer. ``sample`` holds the edges that were patched truly as well:
    columns ``sender``, ``receiver``, ``estimate``, ``true``; ``correlation`` is Spearman's between the two, the
    estimate's error bar: {"spearman", "edges"}. Both are None where no sample was asked for.
    """

    values: NDArray[np.float64]
    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    forwards: int
    backwards: int
    sample: pd.DataFrame | None = None
    correlation: dict[str, float] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        count = int((~np.isnan(self.mean)).sum())
        held = "" if self.correlation is None else f", Spearman {self.correlation['spearman']:.3f} with true patching"
        return f"EdgeAttribution({count} edges, {len(self.values)} pairs{held})"

    @property
    def mean(self) -> NDArray[np.float64]:
        """(sender, receiver) the mean over pairs."""
        found: NDArray[np.float64] = self.values.mean(0)
        return found

    def effect(self, sender: str, receiver: str) -> NDArray[np.float64]:
        """One edge: (pair,).

        Raises:
            HeadscopeError: no such sender or receiver, or a receiver that the sender does not come before.
        """
        if sender not in self.senders or receiver not in self.receivers:
            raise HeadscopeError(f"no edge {sender!r} to {receiver!r}: senders are like L0H1, receivers like L3H2.q")
        found: NDArray[np.float64] = self.values[:, self.senders.index(sender), self.receivers.index(receiver)]
        if np.isnan(found).all():
            raise HeadscopeError(f"no edge goes from {sender} to {receiver}: {sender} is not before it in the pass")
        return found

    def top(self, count: int = 20) -> pd.DataFrame:
        """The ``count`` edges of largest magnitude: ``sender``, ``receiver``, ``effect``, ``ci_low``, ``ci_high``
        (bootstrap over pairs), ``n``."""
        size = np.nan_to_num(np.abs(self.mean), nan=-1.0)
        check_counts(1, count=count)
        order = np.argsort(-size, axis=None, kind="stable")[: min(count, int((size >= 0).sum()))]
        rows, columns = np.unravel_index(order, size.shape)
        chosen = self.values[:, rows, columns]
        low, high = bootstrap_mean(chosen)
        return pd.DataFrame(
            {
                "sender": [self.senders[i] for i in rows],
                "receiver": [self.receivers[j] for j in columns],
                "effect": chosen.mean(0),
                "ci_low": low,
                "ci_high": high,
                "n": len(chosen),
            }
        )


def edge_attribution(
    lm: LanguageModel,
    pairs: Pairs,
    positions: Any = None,
    *,
    steps: int = 5,
    sample: int = 0,
    direction: Direction = "noise",
    metric: Metric = logit_difference,
    normalize: bool = True,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> EdgeAttribution:
    """Every edge's effect on the answer as ``path_effect`` with frozen MLPs would find it, to first order.

    Syed et al. 2023, "Attribution Patching Outperforms Automated Circuit Discovery" (EAP, arXiv 2310.10348): (what the
    sender writes in the other run - what it writes in this one) . dL/d(what the receiver reads). Hanna et al. 2024,
    "Have Faith in Faithfulness" (EAP-IG, arXiv 2403.17806, Eq. 3; hannamw/EAP-IG): the gradient is the mean over
    ``steps`` points base + j / steps (source - base), j = 0 ... steps - 1, of what enters the first layer; one step is
    EAP. The base run under ``"noise"`` is the clean one, under ``"denoise"`` the corrupt one.

    Edges go from the embedding, heads and MLPs to later heads' q, k and v, to later MLPs and to the logits (the stream
    behind the last layer), straight: nothing else moves. A head's own k and v are meant where heads share them. In a
    block whose attention and MLP are added at once, heads do not send to the MLP beside them. All edges of a batch take
    a forward pass of the other run, and a forward and a backward pass a step; then a product with the derivative of
    one layer's reading for every receiver, one of its writing for every sender, and the products of both. No map is
    built; what each sender would write is held, a vector of the stream a sender, token and pair.

    What differs from theirs: theirs runs in TransformerLens, which folds norms; here gradients go through every norm as
    it is, and where one stands between a head and the stream (Gemma 2 and 3, OLMo 2) what the head would write is its
    derivative at the base run times what moves [OURS]. Theirs averages over the interpolated points of the token
    embeddings; here of what enters the first layer, behind GPT-2's positions, which both prompts share.

    What it does not show: an edge where the answer is far from linear between the two runs; what edges do together.
    ``sample`` edges say how well it does.

    Args:
        lm: load_model's result, or what load_model takes.
        positions, metric, normalize: as in ``patch_heads``; the tokens at which the edges are cut, None: all.
        sample: so many edges (not of the embedding), drawn at random, are patched truly as well, by path patching with
            every other head and MLP held; their forward passes are not in ``forwards``.

    Raises:
        HeadscopeError: a model whose layers' parts do not add up to its stream; as ``patch_heads``.
    """
    lm = load_model(lm)
    check_counts(1, steps=steps)
    check_counts(0, sample=sample)
    if direction not in UNIT:
        raise HeadscopeError(f"direction is 'denoise' or 'noise', not {direction!r}")
    if direction == "denoise":
        pairs = replace(pairs, clean=pairs.corrupt, corrupt=pairs.clean)
    parts = list(zip(pairs.batches(batch_size), pairs.where(positions).split(batch_size), strict=True))
    found = [first_order(lm, part, where, metric, steps) for part, where in track(parts, "edges", enabled=progress)]
    base, other = (np.concatenate([getattr(one, name) for one in found]) for name in ("base", "other"))
    moved = np.concatenate([one.values for one in found])
    values = share(moved + base[:, None, None], base, other, normalize=normalize)
    made = provenance(lm, prompts=pairs.texts, positions=str(positions), steps=steps, direction=direction,
                      sample=sample, seed=seed) | {"unit": UNIT[direction] if normalize else "metric"}  # fmt: skip
    edges = EdgeAttribution(values, tuple(found[0].senders), tuple(found[0].receivers), 1 + steps, steps,
                            provenance=made)  # fmt: skip
    if not sample:
        return edges
    drawn = _drawn(edges, sample, seed)
    true = _true(lm, pairs, drawn, positions, metric, batch_size, normalize, progress)
    rows = [(s, r, float(edges.effect(s, r).mean()), x) for (s, r), x in zip(drawn, true, strict=True)]
    frame = pd.DataFrame(rows, columns=["sender", "receiver", "estimate", "true"])
    rank = float(spearmanr(frame["estimate"], frame["true"]).statistic)
    return replace(edges, sample=frame, correlation={"spearman": rank, "edges": len(frame)})


def _drawn(edges: EdgeAttribution, count: int, seed: int) -> list[tuple[str, str]]:
    """Edges drawn without looking at what they do.

    Raises:
        HeadscopeError: too few to rank.
    """
    there = [(i, j) for i, j in np.argwhere(~np.isnan(edges.mean)) if edges.senders[i] != EMBEDDING]
    if min(count, len(there)) < 3:
        raise HeadscopeError(f"{min(count, len(there))} edges are too few to rank: sample at least 3")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(there))[:count])
    return [(edges.senders[i], edges.receivers[j]) for i, j in (there[n] for n in chosen)]


def _true(
    lm: LanguageModel,
    pairs: Pairs,
    edges: Sequence[tuple[str, str]],
    positions: Any,
    metric: Metric,
    batch_size: int,
    normalize: bool,
    progress: bool,
) -> list[float]:
    """Their effects by path patching, everything else held: the mean over pairs of each, in order."""
    found: dict[tuple[str, str], list[NDArray[np.float64]]] = {edge: [] for edge in edges}
    base, other = [], []
    parts = list(zip(pairs.batches(batch_size), pairs.where(positions).split(batch_size), strict=True))
    for part, where in track(parts, "true edges", enabled=progress):
        for receiver in dict.fromkeys(receiver for _, receiver in edges):
            senders = [sender for sender, one in edges if one == receiver]
            nodes = () if receiver == LOGITS else receivers_of(receiver, "q")
            stage = Stage(lm, part, nodes, where, True, metric)
            for sender, row in zip(senders, stage.effects([[Node.of(one)] for one in senders]), strict=True):
                found[sender, receiver].append(row)
        base.append(stage.runs.base)
        other.append(stage.runs.other)
    values = np.stack([np.concatenate(rows) for rows in found.values()], 1)
    effects = share(values, np.concatenate(base), np.concatenate(other), normalize=normalize)
    return [float(x) for x in effects.mean(0)]
