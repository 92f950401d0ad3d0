"""Anchored bias: neurons and heads that favour the first letter, each edited as its paper does, beside its control."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_counts
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.paired import mean_interval
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.progress import track
from headscope.interp.sites import attached
from headscope.interventions.applying import apply
from headscope.interventions.attention.swap import SwapKeys
from headscope.interventions.base import Intervention
from headscope.interventions.neurons.value_vectors import EditValueVectors
from headscope.interventions.tasks.multiple_choice import LETTERS, MultipleChoice
from headscope.probes.lenses.anchored import AnchoredNeuron, anchor_lens, anchored_neurons, away_from_anchor
from headscope.probes.lenses.neurons import Neurons


@dataclass(frozen=True, eq=False)
class AnchorStudy:
    """What ``study_anchor`` found.

    Attributes:
        trials: a row a prompt and edit: ``question``, ``edit``, ``layer``, ``neuron`` and its ``activation`` m (for
            edits of neurons), ``letter`` and ``right`` (1 or 0) after it, ``margin`` of the right letter over the best
            other and its ``change``, in nats.
        heads: those whose writing alone favours the anchor most, found on other questions than ``trials`` judges.
        asked: prompts in all; ``anchored``: those of them where the anchor is chosen and wrong.
    """

    trials: pd.DataFrame
    heads: HeadSet
    asked: int
    anchored: int

    def to_frame(self) -> pd.DataFrame:
        """A row an edit and sign of m: ``n`` edits, ``right`` and the margin's ``change`` (nats), each with a 95 %
        interval over questions (``mean_interval``), and the share of ``anchor`` chosen still."""
        rows = []
        sign = np.sign(self.trials["activation"]).map({1.0: "m > 0", -1.0: "m < 0"}).fillna("")
        for (edit, of), own in self.trials.groupby(["edit", sign], sort=False):
            values = own[["right", "change"]].to_numpy(np.float64)
            low, high = mean_interval(values, own["question"].to_numpy(np.int64))
            (right, change), anchor = values.mean(0), float((own["letter"] == LETTERS[0]).mean())
            rows.append((edit, of, len(own), right, low[0], high[0], change, low[1], high[1], anchor))
        names = "edit sign n right right_low right_high change change_low change_high anchor".split()
        return pd.DataFrame(rows, columns=names)


def study_anchor(
    lm: LanguageModel,
    task: MultipleChoice | None = None,
    *,
    prompts: int = 18,
    last: int = 8,
    top: int = 10,
    gap: float = 4.0,
    heads: int = 4,
    controls: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> AnchorStudy:
    """Edit what anchors a model to the first letter, where it chooses it and is wrong.

    Li & Gao 2024, "Anchored Answers" (arXiv 2405.03205; demos/mitigate_mlp.ipynb). ``"value vector"``: in one layer at
    a time the largest of ``anchored_neurons`` gets - 1 u[anchor] + 8 u[right letter]. Its effect goes with the sign of
    its activation m (they do not say so; their GELU model has few of m < 0): ``"turned"`` is the same edit times the
    sign [OURS], where m < 0. ``"other neuron"``, the control: the neuron of the same layer that is no such neuron and
    whose m is nearest. ``"keys swapped"``: in the last row, heads whose writing alone favours the anchor
    (``anchor_lens``, found on every other question; the authors' rule is not published [OURS]) exchange the anchor's
    weight for the right letter's; ``"random heads"`` of the same layers do so too.

    Both edits are told the right answer, so that none is a cure: they say what these parts can do. What it does not
    show: that a part causes the bias; an edit towards a letter may act from anywhere, which is what controls are for.

    Args:
        task: letters, with single spaces before them (None: its defaults).
        prompts: at most so many where the anchor is chosen and wrong.
        last: layers of neurons, from the last.
        top, gap: of ``anchored_neurons``.
        heads: how many.
        controls: sets of random heads.

    Raises:
        HeadscopeError: a task that does not choose letters, or a model that the first letter does not anchor here.
    """
    check_counts(1, prompts=prompts, last=last, top=top, heads=heads)
    check_counts(0, controls=controls)
    lm, task = load_model(lm), task or MultipleChoice()
    if task.scoring != "letter" or task.chat:
        raise HeadscopeError("anchored bias is that of letters after a plain prompt: scoring='letter', chat=False")
    trials = task.trials(lm)
    plain = [task.run(lm, trial) for trial in track(trials, "unedited", enabled=progress)]
    held = [(t, r) for t, r in zip(trials, plain, strict=True) if r["letter"] == LETTERS[0] != r["gold_letter"]]
    find, judge = ([one for one in held if one[0]["question"] % 2 == odd] for odd in (0, 1))
    if not find or not judge:
        raise HeadscopeError(f"{lm.name} chooses no wrong {LETTERS[0]} in one half of the questions: give more")
    chosen = _anchoring_heads(lm, task, find[:prompts], heads)
    drawn = [chosen.matched_random(lm.info.heads, seed + n) for n in range(controls)]
    swaps = [("keys swapped", _swap(chosen)), *(("random heads", _swap(mine)) for mine in drawn)]
    rows = []
    for trial, before in track(judge[:prompts], "edited", enabled=progress):
        edits = [(*edit, None) for edit in swaps]
        for name, edit, neuron in [*_neuron_edits(lm, task, trial, before, last, top, gap), *edits]:
            with apply(lm, edit):
                after = task.run(lm, trial)
            row = {"question": trial["question"], "turn": trial["turn"], "edit": name}
            row |= {} if neuron is None else {"layer": neuron[0], "neuron": neuron[1], "activation": neuron[2]}
            row |= {"letter": after["letter"], "right": after["score"], "margin": after["margin"]}
            rows.append(row | {"change": after["margin"] - before["margin"]})
    return AnchorStudy(pd.DataFrame(rows), chosen, len(trials), len(held))


def _swap(heads: HeadSet) -> SwapKeys:
    return SwapKeys(heads, first="anchor", second="gold_letter", during="answer")


def _anchoring_heads(
    lm: LanguageModel, task: MultipleChoice, held: Sequence[tuple[Trial, dict[str, Any]]], count: int
) -> HeadSet:
    texts = [task.build(lm, trial).text for trial, _ in held]
    right = [f" {result['gold_letter']}" for _, result in held]
    return anchor_lens(lm, texts, [f" {LETTERS[0]}"] * len(texts), right).heads.top(count)


def _neuron_edits(
    lm: LanguageModel, task: MultipleChoice, trial: Trial, before: dict[str, Any], last: int, top: int, gap: float
) -> Iterator[tuple[str, Intervention, tuple[int, int, float]]]:
    """The edits of one prompt with their neuron and its m, a layer after the other from the last."""
    text, anchor, right = task.build(lm, trial).text, f" {LETTERS[0]}", f" {before['gold_letter']}"
    seen = Neurons()
    with attached(lm, seen):
        lm(text)
    found: dict[int, list[AnchoredNeuron]] = {}
    for neuron in anchored_neurons(lm, text, anchor, right, top=top, gap=gap):
        if neuron.layer >= lm.info.layers - last:
            found.setdefault(neuron.layer, []).append(neuron)
    add = away_from_anchor(lm, anchor, right)
    for layer, own in found.items():
        m, one = seen.m[layer][0].float(), own[0]
        apart = (m - one.activation).abs()
        apart[[neuron.neuron for neuron in own]] = torch.inf
        other = int(apart.argmin())
        place = (layer, one.neuron, one.activation)
        yield "value vector", EditValueVectors(((layer, one.neuron),), add=add), place
        if one.activation < 0:
            yield "turned", EditValueVectors(((layer, one.neuron),), add=-add), place
        yield "other neuron", EditValueVectors(((layer, other),), add=add), (layer, other, float(m[other]))
