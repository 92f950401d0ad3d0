"""Attention knockout: what becomes of the answer when one span no longer reads another, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_counts
from headscope.interp.results.bootstrap import bootstrap_mean
from headscope.interp.results.headset import HeadSet
from headscope.interp.runs.progress import track
from headscope.interp.sites.sizes import tower_size
from headscope.probes.patching.activation import numbers
from headscope.probes.patching.pairs import Metric, Pairs, answer_probability, measure
from headscope.probes.patching.places import Places, chunks, in_window, some_heads


def attention_knockout(
    lm: LanguageModel,
    pairs: Pairs,
    keys: Any,
    queries: Any = -1,
    *,
    window: int | None = None,
    heads: HeadSet | str | Sequence[Any] | None = None,
    metric: Metric = answer_probability,
    relative: bool = True,
    batch_size: int = 16,
    together: int = 4,
    progress: bool = True,
) -> pd.DataFrame:
    """The change of the answer where the tokens ``queries`` no longer see the tokens ``keys``, in a window of layers.

    Geva et al. 2023, "Dissecting Recall of Factual Associations in Auto-Regressive Language Models" (arXiv 2304.14767,
    Section 5): scores of these pairs are -inf before softmax, in every head of ``window`` layers around each layer l
    (l - w // 2 to l + w // 2 where w is odd, cut off at the model's ends), and the number is the relative change of the
    answer's probability, (cut - whole) / whole, a mean over prompts. Only the clean prompts are read.

    What differs: their windows are 9 of 48 layers and 5 of 28; other models get as large a share [OURS]. A query whose
    every key is cut reads nothing, where their lowest finite number lets it read the whole text, later tokens too.

    What it does not show: what passes along the edge (only that the answer needs it, or what takes its place when it is
    gone), and edges that others stand in for: no drop is no proof. The other keys take up the mass.

    Args:
        lm: load_model's result, or what load_model takes.
        keys, queries: positions as ``Pairs.where`` takes them: a number, a span, one an example, a name of ``spans``.
        window: layers cut together.
        heads: these alone, where a window holds them (None: all).
        metric: as in ``patch_heads``.
        relative: False: in the metric's own unit, cut - whole.
        batch_size: prompts in a pass; ``together``: windows in a pass, each with a copy of the prompts.

    Returns:
        columns ``layer`` (the window's middle), ``effect``, ``ci_low``, ``ci_high`` (bootstrap over prompts), ``n``;
        ``attrs`` hold ``unit``, ``whole`` (the metric's mean without a cut) and ``window``.

    Raises:
        HeadscopeError: positions that a prompt does not have, no such head, or no query that comes after a key.
    """
    lm = load_model(lm)
    check_counts(1, window=window)
    size = tower_size(lm)
    layers = sorted(size.heads) or list(range(lm.info.layers))
    width = max(1, round(lm.info.layers * 9 / 48)) if window is None else window
    chosen = some_heads(heads, lm.info.layers, lm.info.heads)
    hidden, reading = pairs.where(keys), pairs.where(queries)
    _check(hidden, reading)
    found, whole, first = [], [], 0
    for part in track(pairs.batches(batch_size), "knockout", enabled=progress):
        rows = slice(first, first + len(part))
        first += len(part)
        whole.append(numbers(measure(lm, part, part.clean, Places(), metric))[0])
        values = [
            numbers(
                measure(
                    lm,
                    part,
                    part.clean,
                    _Cut(some, width, hidden[rows], reading[rows], chosen),
                    metric,
                    copies=len(some),
                )
            )  # fmt: skip
            for some in chunks(layers, together)
        ]
        found.append(np.concatenate(values).T)
    base = np.concatenate(whole)[:, None]
    if relative and not base.all():
        raise HeadscopeError("the metric is 0 for a prompt, so a relative change is not defined: pass relative=False")
    trials = (np.concatenate(found) - base) / (base if relative else 1)
    low, high = bootstrap_mean(trials)
    columns = {"layer": layers, "effect": trials.mean(0), "ci_low": low, "ci_high": high, "n": len(trials)}
    frame = pd.DataFrame(columns)
    unit = "relative change of the metric" if relative else "metric"
    frame.attrs |= {"unit": unit, "whole": float(base.mean()), "window": width}
    return frame


def _check(hidden: Tensor, reading: Tensor) -> None:
    """Refuse a cut that hides nothing: under a causal mask keys come first."""
    at = torch.arange(hidden.shape[1])
    earliest = torch.where(hidden, at, hidden.shape[1]).amin(1)
    latest = torch.where(reading, at, -1).amax(1)
    if bool((latest < earliest).any()):
        raise HeadscopeError("in a prompt every one of the queries comes before the keys, so there is nothing to cut")


class _Cut(Handler):
    """In each copy of the prompts, around one of ``middles``, rows ``reading`` do not see keys ``hidden`` (example,
    token)."""

    def __init__(
        self, middles: Sequence[int], width: int, hidden: Tensor, reading: Tensor, heads: HeadSet | None
    ) -> None:
        self.middles, self.width, self.hidden, self.reading, self.heads = middles, width, hidden, reading, heads

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Add a rule to the mask; no map is made."""
        copies = torch.tensor([in_window(layer, call.layer, self.width) for layer in self.middles])
        mine = torch.ones(call.query.shape[1], dtype=torch.bool)
        if self.heads is not None:
            mine = torch.tensor([(call.layer, head) in self.heads for head in range(len(mine))])
        if not copies.any() or not mine.any():
            return call
        device, count = call.query.device, len(self.hidden)
        active = copies.repeat_interleave(count).to(device)  # (copy x example,)
        reads, hides = (x.repeat(len(copies), 1).to(device) for x in (self.reading, self.hidden))
        mine, other = mine.to(device), call.mask.rule

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = ~(active[b] & mine[h] & reads[b, q] & hides[b, k])
            return seen if other is None else seen & other(b, h, q, k)

        return call.with_(mask=replace(call.mask, rule=rule, examples=len(active)))
