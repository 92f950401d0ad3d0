"""Path patching: what heads do to the answer through chosen readers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.files import folder_of
from headscope.interp.runs.loop import opened, run_steps
from headscope.interp.runs.provenance import describe, fingerprint, provenance
from headscope.probes.patching.activation import Runs
from headscope.probes.patching.nodes import LOGITS, Node, check_senders, receivers_of, senders_of
from headscope.probes.patching.pairs import Metric, Pairs, logit_difference, measure, share
from headscope.probes.patching.places import Change, Place, Places, chunks, in_turn, layers_of, put


def path_patching(
    lm: LanguageModel,
    pairs: Pairs,
    receivers: Any = LOGITS,
    component: str = "q",
    positions: Any = -1,
    *,
    freeze_mlps: bool = False,
    published: bool = False,
    metric: Metric = logit_difference,
    normalize: bool = True,
    batch_size: int = 25,
    together: int = 4,
    out: str | Path | None = None,
    progress: bool = True,
) -> HeadScores:
    """The effect of each head on the answer that goes through ``receivers`` and no other head.

    Merullo et al. 2024, "Circuit Component Reuse" (arXiv 2310.08744; jmerullo/circuit_reuse @ e7cc30e,
    ``patching_utils.py``), after Wang et al. 2022 (arXiv 2211.00593) and Goldowsky-Dill et al. 2023 (arXiv 2304.05969):
    1. the clean and the corrupt run are kept; 2. for every sender in the clean run, its z at ``positions`` is the
    corrupt one and all other heads' z are the clean ones, MLPs are computed anew (or clean: ``freeze_mlps``), and what
    the receivers read (or write: z) is kept; 3. the clean run with these values of the receivers at ``positions`` gives
    D'. The effect is (D' - D_clean) / (D_corrupt - D_clean): the share of the difference destroyed.

    What differs from their code: senders are in every layer below the *highest* receiver (theirs: up to the lowest, so
    that heads between receivers are left out), and those in a receiver's own layer, which cannot reach it, have no
    score. Values are kept before anything is frozen: theirs overwrites what it kept of ``"z"``, whose effect is then 0.
    Heads are frozen at every position, not at ``positions`` alone, which is the same for one position, and right for
    several. A trial is a pair, as in ``patch_heads``; ``published``: a batch of 25, a ratio of batch means, times -100.

    What it does not show: paths through other positions than ``positions`` (with one, a head that reads what the sender
    left elsewhere is no receiver), and redundant paths: what is frozen or computed anew may make up for a loss.

    Args:
        lm: load_model's result, or what load_model takes.
        receivers: LOGITS, or heads (a HeadSet, ``"L9H6,L9H9"``, nodes such as ``"L3H2.v"``, several of either).
        component: which of a receiver's values, where its name does not say: q, k, v or z.
        positions: as ``Pairs.where`` takes them, -1 in the paper; None: all, each position's own paths.
        batch_size: pairs in a pass; ``together``: senders in a pass. Two forward passes a sender and batch.
        out: folder for the scores and, from the first pass on, for every finished step of them
            (``path_patching.jsonl``), which a run that was killed or interrupted takes up when it is run again.

    Raises:
        HeadscopeError: no such receiver, no head below it, a folder of another run, or, with ``out``, a metric that
            cannot be told from another.
    """
    folder, lm = folder_of(out), load_model(lm)
    nodes = receivers_of(receivers, component)
    parts = pairs.batches_at(25 if published else batch_size, positions)
    held: dict[int, Stage] = {}

    def stage(batch: int) -> Stage:
        if batch not in held:
            held.clear()
            held[batch] = Stage(lm, parts[batch][0], nodes, parts[batch][1], freeze_mlps, metric)
        return held[batch]

    senders = [Node(n, h) for n in stage(0).layers if n < stage(0).top for h in range(lm.info.heads)]
    if not senders:
        raise HeadscopeError(f"no head is below {', '.join(map(str, nodes))}, so none can send anything to it")
    work = [(batch, some) for batch in range(len(parts)) for some in chunks(senders, together)]

    def step(index: int) -> dict[str, Any]:
        batch, some = work[index]
        rows = stage(batch).effects([[node] for node in some])
        runs = stage(batch).runs
        return {"effects": [row.tolist() for row in rows], "base": runs.base.tolist(), "other": runs.other.tolist()}

    made = provenance(lm, prompts=pairs.texts, receivers=[str(node) for node in nodes], positions=str(positions),
                      freeze_mlps=freeze_mlps, published=published)  # fmt: skip
    config: dict[str, Any] = {}
    if folder is not None:  # only there is a metric compared, which not every object can be
        config = {name: made[name] for name in ("model", "parameters", "prompts_sha256")}
        config |= {"weights": fingerprint(lm.inner), "metric": describe(metric), "together": together}
        config |= {"answers": describe([pairs.answers, pairs.others]), "batches": [len(part) for part, _ in parts]}
        config |= {"where": describe(pairs.where(positions))}  # a name, or -1, means other tokens in other pairs
    with opened(None if folder is None else folder / "path_patching.jsonl", config) as journal:
        results = run_steps(journal, len(work), step, "path patching", progress=progress)
    values = [np.full((len(part), lm.info.layers, lm.info.heads), np.nan) for part, _ in parts]
    base, other = ([np.zeros(len(part)) for part, _ in parts] for _ in range(2))
    for (batch, some), found in zip(work, results, strict=True):
        base[batch], other[batch] = (np.asarray(found[name], dtype=np.float64) for name in ("base", "other"))
        for node, row in zip(some, found["effects"], strict=True):
            values[batch][:, node.layer, node.head] = row
    scores = _scores(values, base, other, made, published, normalize)
    if folder is not None:
        scores.save(folder)
    return scores


def _scores(
    values: list[NDArray[np.float64]],
    base: list[NDArray[np.float64]],
    other: list[NDArray[np.float64]],
    made: dict[str, Any],
    published: bool,
    normalize: bool,
) -> HeadScores:
    if published:
        ratios = [
            share(v.mean(0)[None], b.mean()[None], o.mean()[None], normalize=True)[0]
            for v, b, o in zip(values, base, other, strict=True)
        ]
        return HeadScores("path_patching", -100 * np.stack(ratios), made | {"unit": "-100 x share, batch means"})
    trials = share(np.concatenate(values), np.concatenate(base), np.concatenate(other), normalize=normalize)
    return HeadScores("path_patching", trials, made | {"unit": "share of the difference destroyed"})


def path_effect(
    lm: LanguageModel,
    pairs: Pairs,
    senders: Iterable[Any],
    receivers: Any = LOGITS,
    component: str = "q",
    positions: Any = None,
    *,
    freeze_mlps: bool = False,
    metric: Metric = logit_difference,
    normalize: bool = True,
    batch_size: int = 16,
) -> NDArray[np.float64]:
    """The effect of a set of senders together, heads and MLPs of any layers, through a set of receivers: (pair,).

    As ``path_patching``, for any senders and receivers: in step 2 all senders are corrupt at once, every other head
    (and with ``freeze_mlps`` every other MLP) is clean, and each receiver takes what reaches it from the
    senders below it. A receiver that has none below keeps its clean value. MLPs that are not frozen carry what they are
    given: a path from a head through an MLP to a receiver counts as direct; freeze them where MLPs are nodes.

    Raises:
        HeadscopeError: no such node, or a sender that comes before none of the receivers in the pass.
    """
    lm = load_model(lm)
    nodes, given = receivers_of(receivers, component), senders_of(senders)
    check_senders(given, nodes)
    values, base, other = [], [], []
    for part, where in pairs.batches_at(batch_size, positions):
        stage = Stage(lm, part, nodes, where, freeze_mlps, metric, mlps=any(node.head is None for node in given))
        values.append(stage.effects([given])[0])
        base.append(stage.runs.base)
        other.append(stage.runs.other)
    return share(np.concatenate(values), np.concatenate(base), np.concatenate(other), normalize=normalize)


class Stage:
    """Some pairs' runs, and the effects of groups of senders on the receivers in them.

    ``layers`` are those that attend; heads below layer ``top`` can reach a receiver.
    """

    def __init__(
        self,
        lm: LanguageModel,
        pairs: Pairs,
        receivers: Sequence[Node],
        positions: Any,
        freeze_mlps: bool,
        metric: Metric,
        *,
        mlps: bool = False,
    ) -> None:
        self.lm, self.pairs, self.receivers, self.where = lm, pairs, tuple(receivers), pairs.where(positions)
        self.sites = ("z", "mlp_out") if freeze_mlps or mlps else ("z",)
        self.frozen = ("z", "mlp_out") if freeze_mlps else ("z",)
        self.runs = Runs(lm, pairs, self.sites, "noise", metric)
        self.layers = layers_of(self.runs.own, "z")
        highest = max((node.layer for node in receivers), default=1 + self.layers[-1])
        after = any(node.component == "mlp_out" for node in receivers if node.layer == highest)
        self.top = highest + after  # a head's output reaches the MLP of its own layer
        for node in receivers:
            if node.layer not in self.layers or (node.head or 0) >= lm.info.heads:
                raise HeadscopeError(f"{lm.name} has no {node} that attends")

    def effects(self, groups: Sequence[Sequence[Node]]) -> list[NDArray[np.float64]]:
        """The metric (example,) of each group of senders patched together, all groups in one pass a step."""
        copies = len(groups)
        handler = Places(self._froze(groups), keep={node.component for node in self.receivers} or {"resid_post"})
        measure(self.lm, self.pairs, self.runs.ids, handler, self.runs.metric, copies=copies)
        found: list[NDArray[np.float64]] = list(self.runs.patched(self._received(handler.kept, copies), copies))
        return found

    def _froze(self, groups: Sequence[Sequence[Node]]) -> dict[Place, Change]:
        """Step 2: every head clean but the senders."""
        copies, everywhere = len(groups), torch.ones_like(self.where)
        all_of = [(copy, None) for copy in range(copies)]
        changes: dict[Place, list[Change]] = {
            at: [put(x, everywhere, copies, all_of)] for at, x in self.runs.own.items() if at[0] in self.frozen
        }
        for copy, group in enumerate(groups):
            for node in group:
                at = (node.site, node.layer)
                if at not in self.runs.given or (node.head or 0) >= self.lm.info.heads:
                    raise HeadscopeError(f"{self.lm.name} has no {node} that writes to the stream")
                changes.setdefault(at, []).append(put(self.runs.given[at], self.where, copies, [(copy, node.head)]))
        return {at: in_turn(some) for at, some in changes.items()}

    def _received(self, kept: Mapping[Place, Tensor], copies: int) -> dict[Place, Change]:
        """Step 3: the receivers as step 2 found them."""
        where = self.where.repeat(copies, 1)
        if not self.receivers:
            last = max(layers_of(kept, "resid_post"))
            return {("resid_post", last): put(kept["resid_post", last], where, 1, [(0, None)])}
        changes: dict[Place, list[Change]] = {}
        for node in self.receivers:
            at = (node.component, node.layer)
            changes.setdefault(at, []).append(put(kept[at], where, 1, [(0, node.head)]))
        return {at: in_turn(some) for at, some in changes.items()}
