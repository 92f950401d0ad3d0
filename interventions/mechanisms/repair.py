"""Four-head repair: heads that a task leaves idle are made to look where they would in another, and what it gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.bootstrap import bootstrap_mean
from headscope.interp.results.headset import HeadSet
from headscope.interp.runs.progress import track
from headscope.interventions.applying import apply
from headscope.interventions.attention.force import ForcePattern
from headscope.probes.circuits.evaluation import top_circuit
from headscope.probes.patching.activation import numbers
from headscope.probes.patching.attribution import attribution_patching
from headscope.probes.patching.nodes import Node
from headscope.probes.patching.pairs import Pairs, logit_difference, measure, share
from headscope.probes.patching.path import Stage
from headscope.probes.patching.places import Places, chunks

MEASURES = ("logit difference", "accuracy")


@dataclass(frozen=True, eq=False)
class Roles:
    """Heads of a circuit by what they do, strongest first; weights are shares of the difference that they carry."""

    movers: HeadSet
    negative: HeadSet
    inhibition: HeadSet

    @property
    def four(self) -> HeadSet:
        """The heads that the repair forces: inhibition heads and negative movers."""
        return self.inhibition | self.negative


@dataclass(frozen=True, eq=False)
class Forced:
    """What forcing did: ``plain`` and ``edited`` (pair, measure), ``random`` (set, pair, measure) of matched random
    heads forced in the same way; measures are ``MEASURES``: logits of answer - other, and 1 where the answer is the
    likeliest token of all."""

    heads: HeadSet
    plain: NDArray[np.float64]
    edited: NDArray[np.float64]
    random: NDArray[np.float64]

    def to_frame(self) -> pd.DataFrame:
        """A row a measure: ``before``, ``after``, ``change`` with its interval (95 % bootstrap over pairs), the mean
        change by random heads (``random``, with the lowest and highest set's), the ``difference`` from it with its
        interval, and ``p``, the share of random sets that change as much or more upwards, these heads counted."""
        change, beside = self.edited - self.plain, self.random - self.plain
        low, high = bootstrap_mean(change)
        apart = change - beside.mean(0)
        apart_low, apart_high = bootstrap_mean(apart)
        sets = beside.mean(1)  # (set, measure)
        p = (1 + (sets >= change.mean(0)).sum(0)) / (1 + len(sets))
        columns = {
            "measure": MEASURES,
            "before": self.plain.mean(0),
            "after": self.edited.mean(0),
            "change": change.mean(0),
            "ci_low": low,
            "ci_high": high,
            "random": sets.mean(0),
            "random_low": sets.min(0),
            "random_high": sets.max(0),
            "difference": apart.mean(0),
            "difference_low": apart_low,
            "difference_high": apart_high,
            "p": p,
        }
        return pd.DataFrame(columns)


def circuit_roles(
    lm: LanguageModel,
    pairs: Pairs,
    *,
    movers: int = 3,
    negative: int = 1,
    inhibition: int = 3,
    candidates: int = 40,
    batch_size: int = 16,
    together: int = 8,
    progress: bool = True,
) -> Roles:
    """Movers, negative movers and inhibition heads of indirect object identification, found in this model.

    As Wang et al. 2022 (arXiv 2211.00593) and Merullo et al. 2024 (arXiv 2310.08744) find them, by path patching at
    the last token: movers carry the answer to the logits, negative movers carry it the other way, inhibition heads
    act through the movers' queries. Only the ``candidates`` heads of largest attribution are asked [OURS], which saves
    passes where there are hundreds of heads. What it does not show: that they do what the names say in this model.

    Args:
        pairs: of ``ioi``.
        movers, negative, inhibition: how many of each, at most; fewer where fewer have an effect of that sign.

    Raises:
        HeadscopeError: no head carries the answer to the logits, or none acts through the movers' queries.
    """
    lm = load_model(lm)
    found = attribution_patching(lm, pairs, batch_size=batch_size, progress=progress)
    asked = [Node(*head) for head in top_circuit(found.scores, min(candidates, found.scores.mean.size)).heads]
    direct = _through(lm, pairs, (), asked, batch_size, together)
    for_answer, against = _strongest(asked, direct, movers), _strongest(asked, -direct, negative)
    if not len(for_answer):
        raise HeadscopeError(f"no head of {lm.name} carries the answer to the logits at the last token of these pairs")
    readers = tuple(Node(*head, "q") for head in for_answer)
    below = [node for node in asked if node.layer < max(reader.layer for reader in readers)]
    named = {*for_answer, *against}
    below = [node for node in below if (node.layer, node.head) not in named]
    through = _through(lm, pairs, readers, below, batch_size, together) if below else np.zeros(0)
    inhibiting = _strongest(below, through, inhibition)
    if not len(inhibiting):
        raise HeadscopeError(f"no head of {lm.name} acts through the queries of {', '.join(map(str, readers))}")
    return Roles(for_answer, against, inhibiting)


def force_heads(
    lm: LanguageModel,
    pairs: Pairs,
    heads: HeadSet | str,
    onto: Sequence[str] | str,
    *,
    strength: float = 1.0,
    randoms: int = 10,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Forced:
    """Force the last row of ``heads`` onto the keys of the spans ``onto``, and measure what the task makes of it.

    The repair of Merullo et al. 2024 (arXiv 2310.08744): in coloured objects, inhibition heads and a negative mover
    that indirect object identification uses lie idle; forced onto the two wrong colours they take GPT-2 medium from
    49.6 % to 93.7 %. How weight is shared is in neither abstract nor code: equal shares in the last row alone, after
    softmax, so that later layers see it [OURS], as ``ForcePattern`` does it. Random heads of the same layers, forced
    onto the same keys, are the control.

    What it does not show: that the heads do in this task what they do in the other, or that the model would look there.

    Args:
        pairs: of ``coloured_objects``; their clean prompts are read.
        heads: such as ``circuit_roles(lm, ioi(lm)).four``.
        onto: names of spans of ``pairs``, whose keys share the row equally: ``("wrong_0", "wrong_1")``.
        strength: s makes the row (1 - s) A + s target.
        randoms: sets of random heads, at least one.

    Raises:
        HeadscopeError: no such span, or one beyond its prompt; no random set; a head that does not exist, or a layer
            with too few heads.
    """
    lm, chosen = load_model(lm), HeadSet.of(heads)
    onto = [onto] if isinstance(onto, str) else list(onto)
    missing = [name for name in onto if name not in pairs.spans]
    if missing or not onto:
        what = ", ".join(map(repr, missing)) if missing else "were named in onto"
        raise HeadscopeError(f"no spans {what}: these pairs have {', '.join(pairs.spans)}")
    for name in onto:
        pairs.where(name)
    if randoms < 1:
        raise HeadscopeError("give at least one set of random heads (randoms): a change alone says little")
    drawn = [chosen.matched_random(lm.info.heads, seed + n) for n in range(randoms)]
    rows: list[list[NDArray[np.float64]]] = [[] for _ in range(2 + randoms)]
    for part in track(pairs.batches(batch_size), "forcing", enabled=progress):
        keys = [[part.spans[name][i] for name in onto] for i in range(len(part))]
        last = [[(n - 1, n)] for n in part.lengths.tolist()]
        for held, mine in zip(rows, [None, chosen, *drawn], strict=True):
            edits = [] if mine is None else [ForcePattern(mine, onto=keys, positions=last, strength=strength)]
            with apply(lm, *edits):
                held.append(numbers(measure(lm, part, part.clean, Places(), _both))[0])
    plain, edited, *random = (np.concatenate(held) for held in rows)
    return Forced(chosen, plain, edited, np.stack(random))


def _both(logits: Tensor, pairs: Pairs) -> Tensor:
    right = logits.argmax(-1) == pairs.answers.to(logits.device)
    return torch.stack([logit_difference(logits, pairs), right.to(logits)], 1)


def _through(
    lm: LanguageModel, pairs: Pairs, receivers: Sequence[Node], senders: Sequence[Node], batch_size: int, together: int
) -> NDArray[np.float64]:
    """The share of the difference that each sender carries through the receivers at the last token: (sender,)."""
    found, base, other = [], [], []
    for part in pairs.batches(batch_size):
        stage = Stage(lm, part, receivers, -1, False, logit_difference)
        rows = [row for some in chunks(senders, together) for row in stage.effects([[node] for node in some])]
        found.append(np.stack(rows, 1))
        base.append(stage.runs.base)
        other.append(stage.runs.other)
    effects = share(np.concatenate(found), np.concatenate(base), np.concatenate(other), normalize=True)
    mean: NDArray[np.float64] = effects.mean(0)
    return mean


def _strongest(nodes: Sequence[Node], effects: NDArray[np.float64], count: int) -> HeadSet:
    order = [i for i in np.argsort(-effects, kind="stable")[:count] if effects[i] > 0]
    return HeadSet(
        tuple((nodes[i].layer, int(nodes[i].head or 0)) for i in order), tuple(float(effects[i]) for i in order)
    )
