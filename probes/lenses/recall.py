"""Factual recall: prompts about capitals, which heads write the topic's own token, and which parts of the last layers
write against the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.placement import fetched
from headscope.interp.results.bootstrap import bootstrap_mean
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.gradients import frozen
from headscope.probes.lenses.attribution import read_last
from headscope.probes.lenses.targets import Token, in_stream, target_pairs, unembedded
from headscope.probes.paths.rows import wrote
from headscope.probes.paths.writers import find_paths

CAPITALS = {
    "China": "Beijing", "USA": "Washington", "Russia": "Moscow", "England": "London", "France": "Paris",
    "Japan": "Tokyo", "Italy": "Rome", "Canada": "Ottawa", "Australia": "Canberra", "Spain": "Madrid",
    "Egypt": "Cairo", "Portugal": "Lisbon", "Austria": "Vienna", "Greece": "Athens", "Thailand": "Bangkok",
}  # fmt: skip
LEADS = (
    "It's crucial to know that",
    "Bear in mind,",
    "Everybody learns at school that",
    "As the map shows,",
    "Travellers soon find out that",
    "In this quiz the right answer is that",
)


@dataclass(frozen=True, eq=False)
class Capitals:
    """``prompts`` that a capital continues, and of each the ids of the country's token (``topics``) and of the
    capital's (``answers``), the number of its country (``groups``) and of its lead-in (``templates``)."""

    prompts: tuple[str, ...]
    topics: tuple[int, ...]
    answers: tuple[int, ...]
    groups: tuple[int, ...]
    templates: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AnswerShares:
    """Direct contributions to the answer's logit less the mean logit of the vocabulary, in logits.

    Attributes:
        heads: (prompt, layer, head) of the ``layers`` asked about; NaN where one has fewer heads or does not attend.
        mlps: (prompt, layer); NaN where no MLP adds to the stream.
        layers: their numbers.
    """

    heads: NDArray[np.float64]
    mlps: NDArray[np.float64]
    layers: tuple[int, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_frame(self, groups: NDArray[np.int64] | None = None) -> pd.DataFrame:
        """A row a part, most negative first: layer, head (-1: the MLP), share with its 95 % bootstrap interval over
        prompts (over ``groups`` of them where given)."""
        whole = np.concatenate([self.heads, self.mlps[..., None]], 2)
        low, high = bootstrap_mean(whole, groups)
        at = np.argwhere(~np.isnan(whole).any(0))
        rows = [
            (self.layers[i], j if j < self.heads.shape[2] else -1, whole[:, i, j].mean(), low[i, j], high[i, j])
            for i, j in at.tolist()
        ]
        frame = pd.DataFrame(rows, columns=["layer", "head", "share", "ci_low", "ci_high"])
        return frame.sort_values("share", kind="stable", ignore_index=True)


def capitals(lm: LanguageModel, leads: Sequence[str] = LEADS) -> Capitals:
    """Prompts "[lead-in] the capital of [country] is" for every lead-in and country.

    After Lv et al. 2024 (arXiv 2403.19521; trestad/Factual-Recall-Mechanism @ 3f180b8, ``fact_dataset.py``): their 15
    countries; two of the lead-ins are theirs, the others ours. A country or capital that is several tokens here is left
    out [OURS], so that topic and answer are a token each.

    Raises:
        HeadscopeError: fewer than four countries are left.
    """
    lm = load_model(lm)
    tokenizer = lm.required_tokenizer()
    rows = []
    for group, names in enumerate(CAPITALS.items()):
        ids = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in names]
        if all(len(one) == 1 and tokenizer.decode(one).strip() == name for one, name in zip(ids, names, strict=True)):
            rows += [
                (f"{lead} the capital of {names[0]} is", int(ids[0][0]), int(ids[1][0]), group, template)
                for template, lead in enumerate(leads)
            ]
    if len({row[3] for row in rows}) < 4:
        raise HeadscopeError(f"{lm.name}: fewer than four countries and their capitals are single tokens")
    return Capitals(*zip(*rows, strict=True))


def topic_ranks(model: Loadable, prompts: Sequence[str], topics: Sequence[Token]) -> HeadScores:
    """How many tokens a head's writing at the last token says more than the prompt's topic: 0 where it writes it.

    The head lens of Lv et al. 2024 (arXiv 2403.19521): unembedding of final norm(W_O z), with the scale that the norm
    gives to what this head writes alone [OURS]. A trial is a prompt. What it does not show: that the model uses it; a
    head that writes little has a rank as well.

    Raises:
        HeadscopeError: as ``logit_attribution``.
    """
    lm = load_model(model)
    ids = target_pairs(lm, prompts, topics, None)
    paths = find_paths(lm)
    found = np.full((len(prompts), len(paths.layers), max(path.heads for path in paths.layers)), np.nan)
    with frozen(lm), torch.no_grad():
        for i, prompt in enumerate(prompts):
            rows = read_last(lm, paths, [prompt])
            for at, path in enumerate(paths.layers):
                if path.attention is not None:
                    logits = paths.unembedding(paths.norm(wrote(path, rows, 0)[0][0].to(lm.model.dtype)))
                    above = logits > logits[:, ids[i][0], None]
                    found[i, at, : path.heads] = above.sum(-1).double().cpu().numpy()
    made = provenance(lm, prompts=prompts, tokens=[pair[0] for pair in ids]) | {"unit": "rank"}
    return HeadScores("topic_rank", found, made)


def answer_shares(model: Loadable, prompts: Sequence[str], answers: Sequence[Token], *, last: int = 1) -> AnswerShares:
    """What every head and MLP of the ``last`` layers writes straight towards the answer at the last token.

    Lv et al. 2024 (arXiv 2403.19521) find that the last layer writes against the right answer. Their formula is not
    published; this is w . N(x) of a part x, the final norm's scale frozen at the stream's, w the answer's unembedding
    less the vocabulary's mean (their metric) [OURS]. What it does not show: that the part goes against this
    answer more than against whatever the model would say; compare with another likely token.

    Raises:
        HeadscopeError: as ``logit_attribution``; more layers than there are.
    """
    lm = load_model(model)
    pairs = target_pairs(lm, prompts, answers, None)
    paths = find_paths(lm)
    if not 0 < last <= len(paths.layers):
        raise HeadscopeError(f"last={last}: {lm.name} has {len(paths.layers)} layers")
    chosen = paths.layers[-last:]
    heads = np.full((len(prompts), last, max(path.heads for path in chosen)), np.nan)
    mlps = np.full(heads.shape[:2], np.nan)
    with frozen(lm), torch.no_grad():
        with fetched(paths.unembedding) as head:
            mean = head.weight.float().mean(0)  # type: ignore[operator]
        for i, prompt in enumerate(prompts):
            rows = read_last(lm, paths, [prompt])
            direction, _ = in_stream(paths, rows, unembedded(paths, [pairs[i]])[0] - mean.to(lm.device))
            for at, path in enumerate(chosen):
                if path.attention is not None:
                    written = wrote(path, rows, 0)[0][0]
                    heads[i, at, : path.heads] = (written.to(direction) @ direction[0]).double().cpu().numpy()
                if path.mlp is not None:
                    mlps[i, at] = float(rows.mlp[path.layer][0, 0].to(direction) @ direction[0])
    made = provenance(lm, prompts=prompts, tokens=[pair[0] for pair in pairs]) | {"unit": "logits"}
    return AnswerShares(heads, mlps, tuple(path.layer for path in chosen), made)
