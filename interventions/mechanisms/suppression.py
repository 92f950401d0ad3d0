"""Last-layer suppression of what a model recalls, and what scaling the suppressing parts gains and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.paired import mean_interval
from headscope.interp.runs.progress import track
from headscope.interp.sites.neurons import down_projection, value_vectors
from headscope.interventions.applying import apply
from headscope.interventions.base import Intervention
from headscope.interventions.neurons.value_vectors import EditValueVectors
from headscope.interventions.outputs.scale import ScaleHeads
from headscope.interventions.tasks.text_loss import TextLoss
from headscope.probes.lenses.recall import AnswerShares, Capitals, answer_shares
from headscope.probes.paths.writers import find_paths

MEASURES = ("p", "log p", "accuracy")
PLAIN = "as it is"
Parts = tuple[HeadSet, tuple[int, ...]]  # heads, and layers whose MLP is meant


@dataclass(frozen=True, eq=False)
class Suppression:
    """What ``study_suppression`` found.

    Attributes:
        shares: of the last layers' parts, on the prompts that they were found on; ``groups_found`` (prompt,), the
            country of each.
        heads, mlps: those that write against the answer.
        values: {condition: (prompt, measure)} on other prompts, ``MEASURES`` of the answer's token.
        groups: (prompt,) the country of each.
        prose: {condition: nats a token} with the edit in every row.
    """

    shares: AnswerShares
    groups_found: NDArray[np.int64]
    heads: HeadSet
    mlps: tuple[int, ...]
    values: dict[str, NDArray[np.float64]]
    groups: NDArray[np.int64]
    prose: dict[str, float]

    def to_frame(self) -> pd.DataFrame:
        """A row a condition and measure: mean, change from no edit with its 95 % interval over countries
        (``mean_interval``), and the loss on prose."""
        rows = []
        for name, values in self.values.items():
            change = values - self.values[PLAIN]
            low, high = mean_interval(change, self.groups)
            for j, measure in enumerate(MEASURES):
                row = (name, measure, values[:, j].mean(), change[:, j].mean(), low[j], high[j], self.prose[name])
                rows.append(row)
        return pd.DataFrame(rows, columns="condition measure mean change ci_low ci_high prose".split())


def study_suppression(
    lm: LanguageModel,
    facts: Capitals,
    *,
    last: int = 1,
    factor: float = 0.0,
    controls: int = 3,
    passages: int = 2,
    length: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Suppression:
    """Find what the last layers write against the right answer, scale it, and say what that does elsewhere.

    After Lv et al. 2024 (arXiv 2403.19521), "anti-overconfidence": heads and MLP of the last layer lower the right
    answer's logit, and taking them back raises it; their formula is not published. Here the parts whose mean
    ``answer_shares`` over half of the countries lies below 0, interval included, are multiplied by ``factor`` at the
    prompt's last token, and the other half of the countries is judged [OURS]: heads, MLPs, both, and random heads of
    the same layers. Prose is read with the same edit in every row.

    What it does not show: that it is a fault that was mended: what lowers a right answer may lower wrong ones as well,
    which accuracy and prose tell.

    Args:
        facts: as ``capitals`` gives them.
        last: how many layers, from the last.
        factor: on what they write; 0 removes it.
        controls: sets of random heads.
        passages, length: of prose, as in ``TextLoss``.

    Raises:
        HeadscopeError: nothing writes against the answer, or fewer than four countries.
    """
    lm = load_model(lm)
    groups = np.array(facts.groups)
    names = np.unique(groups)
    if len(names) < 4:
        raise HeadscopeError("give facts of four groups (countries) or more: half of them find the parts")
    find = np.flatnonzero(np.isin(groups, names[::2])).tolist()
    judge = np.flatnonzero(np.isin(groups, names[1::2])).tolist()
    shares = answer_shares(lm, [facts.prompts[i] for i in find], [facts.answers[i] for i in find], last=last)
    heads, mlps = _against(shares, groups[find])
    conditions: dict[str, Parts] = {PLAIN: (HeadSet(()), ())}
    if len(heads):
        conditions["heads"] = (heads, ())
        conditions |= {
            f"random heads {n}": (heads.matched_random(lm.info.heads, seed + n), ()) for n in range(controls)
        }
    if mlps:
        conditions["MLPs"] = (HeadSet(()), mlps)
    if len(heads) and mlps:
        conditions["heads and MLPs"] = (heads, mlps)
    if len(conditions) == 1:
        raise HeadscopeError(f"no head or MLP of the last {last} layers of {lm.name} writes against these answers")
    values, prose = dict[str, NDArray[np.float64]](), dict[str, float]()
    text = TextLoss(passages, length)
    for name, parts in track(list(conditions.items()), "scaling", enabled=progress):
        values[name] = np.stack([_said(lm, facts.prompts[i], facts.answers[i], parts, factor) for i in judge])
        with apply(lm, *_edits(lm, parts, factor)):
            prose[name] = float(np.mean([text.run(lm, trial)["score"] for trial in text.trials(lm)]))
    return Suppression(shares, groups[find], heads, mlps, values, groups[judge], prose)


def _against(shares: AnswerShares, groups: NDArray[np.int64]) -> Parts:
    low = shares.to_frame(groups)
    low = low[low["ci_high"] < 0]
    own = low[low["head"] >= 0]
    heads = HeadSet(tuple(zip(own["layer"], own["head"], strict=True)), tuple(own["share"]), "against the answer")
    return heads, tuple(low[low["head"] < 0]["layer"].tolist())


def _edits(
    lm: LanguageModel, parts: Parts, factor: float, positions: Sequence[tuple[int, int]] | None = None
) -> list[Intervention]:
    heads, mlps = parts
    edits: list[Intervention] = [ScaleHeads(heads, factor, positions=positions)] if len(heads) else []
    if mlps:
        layers = {path.layer: path.stream for path in find_paths(lm).layers}
        neurons = [(n, i) for n in mlps for i in range(len(value_vectors(down_projection(layers[n], lm.inner))))]
        edits.append(EditValueVectors(tuple(neurons), factor=factor, positions=positions))
    return edits


@torch.no_grad()
def _said(lm: LanguageModel, prompt: str, answer: int, parts: Parts, factor: float) -> NDArray[np.float64]:
    """Probability and log-probability of the answer's token after a prompt, and whether it is the likeliest."""
    end = int(lm.encode(prompt)["input_ids"].shape[1])
    with apply(lm, *_edits(lm, parts, factor, [(end - 1, end)])):
        said = lm(prompt).logits[0, -1].double().log_softmax(-1)
    log_p = float(said[answer])
    return np.array([np.exp(log_p), log_p, float(int(said.argmax()) == answer)])
