"""Activation patching: one site of one run replaced by its value in another run, and what the answer does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

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
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.probes.patching.pairs import Metric, Pairs, logit_difference, measure, share
from headscope.probes.patching.places import COMPONENTS, Place, Places, chunks, in_turn, layers_of, put, some_heads

Direction = Literal["denoise", "noise"]
Source = Literal["prompt", "mean", "random"]
UNIT = {"denoise": "share of the difference restored", "noise": "share of the difference destroyed"}


def patch_heads(
    lm: LanguageModel,
    pairs: Pairs,
    component: str = "z",
    positions: Any = None,
    *,
    heads: HeadSet | str | Sequence[Any] | None = None,
    direction: Direction = "denoise",
    source: Source = "prompt",
    metric: Metric = logit_difference,
    normalize: bool = True,
    batch_size: int = 16,
    together: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> HeadScores:
    """The effect of every head's output z (or its q, k or v) on the answer, one head at a time.

    Interchange intervention (Geiger et al. 2021, arXiv 2106.02997; Zhang and Nanda 2023, arXiv 2309.16042).
    ``"denoise"``: the corrupt run is given the head's clean value, (patched - corrupt) / (clean - corrupt), the share
    of the difference restored. ``"noise"``: the clean run is given the corrupt one, (patched - clean) / (corrupt -
    clean). A trial is a pair, its difference divided by the mean difference of all pairs [OURS], so that a score is a
    ratio of means; its interval takes the divisor as known. What comes later is computed anew: direct and indirect
    effects together. What it does not show: what heads do together (of two that do the same, neither alone destroys),
    nor anything that the two prompts have in common.

    Args:
        lm: load_model's result, or what load_model takes.
        component: ``"z"``, or ``"q"``, ``"k"``, ``"v"`` as this head reads them (heads that share keys keep theirs).
        positions: the tokens patched, as ``Pairs.where`` takes them: None (all), -1, a span, one an example, a name.
        heads: these alone (None: all). Others have no score.
        source: what is put in: the other prompt's value; ``"mean"``: its mean over the pairs of a group, position by
            position; ``"random"``: the run's own value plus Gaussian noise of three standard deviations of the site
            (over all pairs, tokens and dimensions of the head), one draw a pair, the same in any batch.
        metric: (logits (example, vocabulary) after the last token, pairs) -> (example,).
        normalize: False: in the metric's own unit (logits), undivided.
        batch_size: pairs in a pass.
        together: heads in a pass, each with a copy of the pairs. Neither changes a number beyond rounding.

    Raises:
        HeadscopeError: no such component, position or head, or pairs without a difference.
    """
    lm = load_model(lm)
    if component not in COMPONENTS:
        raise HeadscopeError(f"no component {component!r}: name one of {', '.join(COMPONENTS)}")
    chosen = some_heads(heads, lm.info.layers, lm.info.heads)
    found, bases, others, first, tokens = [], [], [], 0, pairs.where(positions)
    whole = _over_all(lm, pairs, (component,), direction, source, batch_size)
    for part in track(pairs.batches(batch_size), "patching", enabled=progress):
        run = Runs(lm, part, (component,), direction, metric)
        layers = layers_of(run.given, component)
        every = [(layer, head) for layer in layers for head in range(run.given[component, layers[0]].shape[1])]
        todo = every if chosen is None else list(chosen)
        given, where = run.source(source, whole, seed, first), tokens[first : first + len(part)]
        first += len(part)
        values = np.full((len(part), lm.info.layers, lm.info.heads), np.nan)
        for some in chunks(todo, together):
            if missing := [head for head in some if head[0] not in layers]:
                raise HeadscopeError(f"{lm.name} has no head L{missing[0][0]}H{missing[0][1]} that attends")
            changes = {
                (component, layer): put(
                    given[component, layer],
                    where,
                    len(some),
                    [(copy, head) for copy, (at, head) in enumerate(some) if at == layer],
                )
                for layer in {layer for layer, _ in some}
            }
            for (layer, head), row in zip(some, run.patched(changes, len(some)), strict=True):
                values[:, layer, head] = row
        found.append(values)
        bases.append(run.base)
        others.append(run.other)
    trials = share(np.concatenate(found), np.concatenate(bases), np.concatenate(others), normalize=normalize)
    made = provenance(lm, prompts=pairs.texts, component=component, positions=str(positions), direction=direction,
                      source=source, seed=seed)  # fmt: skip
    return HeadScores(f"patching_{component}", trials, made | {"unit": UNIT[direction] if normalize else "metric"})


def patch_places(
    lm: LanguageModel,
    pairs: Pairs,
    place: str = "resid_pre",
    spans: Mapping[str, Any] | None = None,
    *,
    direction: Direction = "denoise",
    source: Source = "prompt",
    metric: Metric = logit_difference,
    normalize: bool = True,
    batch_size: int = 16,
    together: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The effect of the residual stream, or of what attention or an MLP adds to it, layer by layer and span by span.

    As ``patch_heads``, with ``place`` one of ``headscope.interp.attention.stream.PLACES`` (``"mlp_out"`` is after any
    norm of it, as it is added).

    Args:
        spans: {name: positions as ``Pairs.where`` takes them}; None: every position by itself, named by its number,
            which needs prompts of one length.

    Returns:
        columns ``layer``, ``span``, ``effect``, ``ci_low``, ``ci_high`` (bootstrap over pairs), ``n``; ``attrs`` hold
        the ``unit``.

    Raises:
        HeadscopeError: as ``patch_heads``, or a place that the architecture does not have.
    """
    lm = load_model(lm)
    if spans is None:
        if len(set(pairs.lengths.tolist())) > 1:
            raise HeadscopeError("the prompts differ in length, so positions differ in meaning: give spans={name: ...}")
        spans = {str(at): at for at in range(int(pairs.lengths[0]))}
    found, bases, others, first = [], [], [], 0
    whole = _over_all(lm, pairs, (place,), direction, source, batch_size)
    if not spans:
        raise HeadscopeError("no spans were given: name at least one, or leave spans out for every position by itself")
    whole_spans = {name: pairs.where(span) for name, span in spans.items()}
    for part in track(pairs.batches(batch_size), "patching", enabled=progress):
        run = Runs(lm, part, (place,), direction, metric)
        given, layers = run.source(source, whole, seed, first), layers_of(run.given, place)
        values = []
        held = [where[first : first + len(part)] for where in whole_spans.values()]
        first += len(part)
        for layer in layers:
            for some in chunks(held, together):
                puts = [put(given[place, layer], where, len(some), [(i, None)]) for i, where in enumerate(some)]
                values.append(run.patched({(place, layer): in_turn(puts)}, len(some)))
        found.append(np.concatenate(values).T.reshape(len(part), len(layers), len(spans)))
        bases.append(run.base)
        others.append(run.other)
    trials = share(np.concatenate(found), np.concatenate(bases), np.concatenate(others), normalize=normalize)
    low, high = bootstrap_mean(trials)
    frame = pd.DataFrame(
        [
            {"layer": layer, "span": name, "effect": trials[:, i, j].mean(), "ci_low": low[i, j], "ci_high": high[i, j],
             "n": len(trials)}
            for i, layer in enumerate(layers) for j, name in enumerate(spans)
        ]
    )  # fmt: skip
    frame.attrs["unit"] = UNIT[direction] if normalize else "metric"
    return frame


class Runs:
    """The two runs of some pairs: the one that is patched (``base``), and the one that values come from (``other``).

    ``own`` and ``given`` hold what passed the sites in each; ``base`` and ``other`` (example,) their metric.
    """

    def __init__(
        self, lm: LanguageModel, pairs: Pairs, sites: Sequence[str], direction: Direction, metric: Metric
    ) -> None:
        if direction not in UNIT:
            raise HeadscopeError(f"direction is 'denoise' or 'noise', not {direction!r}")
        self.lm, self.pairs, self.metric = lm, pairs, metric
        self.ids = pairs.corrupt if direction == "denoise" else pairs.clean
        self.other_ids = pairs.clean if direction == "denoise" else pairs.corrupt
        held = []
        for ids in (self.ids, self.other_ids):
            handler = Places(keep=sites)
            held.append((numbers(measure(lm, pairs, ids, handler, metric))[0], handler.kept))
        (self.base, self.own), (self.other, self.given) = held

    def patched(self, changes: Mapping[Place, Any], copies: int = 1) -> NDArray[np.float64]:
        """The metric (copy, example) of the base run under ``changes``."""
        return numbers(measure(self.lm, self.pairs, self.ids, Places(changes), self.metric, copies=copies))

    def source(self, kind: Source, whole: Mapping[Place, Tensor], seed: int, first: int) -> dict[Place, Tensor]:
        """What is put in at every site; ``whole`` is known of all pairs, of which these are number ``first`` on."""
        if kind == "prompt":
            return self.given
        if kind == "mean":
            rows = self.pairs.groups
            return {at: mean[rows.to(mean.device)][..., : self.ids.shape[1], :] for at, mean in whole.items()}
        entropy = (np.random.SeedSequence([seed, first + i]) for i in range(len(self.pairs)))
        draws = [torch.Generator().manual_seed(int(one.generate_state(1)[0])) for one in entropy]
        return {at: _noised(x, whole[at], draws) for at, x in self.own.items()}


def numbers(x: Tensor) -> NDArray[np.float64]:
    """A tensor as numbers of numpy."""
    held: NDArray[np.float64] = x.detach().double().cpu().numpy()
    return held


def group_means(kept: Sequence[tuple[Pairs, Mapping[Place, Tensor]]]) -> dict[Place, Tensor]:
    """Means by group and position over batches: (group, ..., token, d) for every site."""
    groups = 1 + max(int(pairs.groups.max()) for pairs, _ in kept)
    sums: dict[Place, Tensor] = {}
    count = torch.zeros(groups, kept[0][0].clean.shape[1])
    for pairs, values in kept:
        count.index_add_(0, pairs.groups, pairs.real.float())
        for at, x in values.items():
            real = pairs.real.to(x.device)
            real = real[:, None, :, None] if x.ndim == 4 else real[..., None]
            sums.setdefault(at, torch.zeros(groups, *x.shape[1:], device=x.device, dtype=torch.float32))
            sums[at].index_add_(0, pairs.groups.to(x.device), torch.where(real, x, 0).float())
    seen = count.clamp(min=1)
    return {at: x / (seen[:, None, :, None] if x.ndim == 4 else seen[..., None]).to(x.device) for at, x in sums.items()}


def _over_all(
    lm: LanguageModel, pairs: Pairs, sites: Sequence[str], direction: Direction, source: Source, batch_size: int
) -> dict[Place, Tensor]:
    """What has to be known of all pairs before any is patched: the other run's means, or the run's own spread."""
    if source not in ("prompt", "mean", "random"):
        raise HeadscopeError(f"source is 'prompt', 'mean' or 'random', not {source!r}")
    if source == "prompt":
        return {}
    kept = []
    for part in pairs.batches(batch_size):
        handler = Places(keep=sites)
        clean = (direction == "denoise") == (source == "mean")
        measure(lm, part, part.clean if clean else part.corrupt, handler)
        kept.append((part, handler.kept if source == "mean" else _moments(part, handler.kept)))
    return group_means(kept) if source == "mean" else _spread([held for _, held in kept])


def _moments(pairs: Pairs, kept: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    """Number, sum and sum of squares of each head's values, or of all: (3, head or 1)."""
    found = {}
    for at, x in kept.items():
        x = x if x.ndim == 4 else x[:, None]
        held = torch.where(pairs.real[:, None, :, None].to(x.device), x, 0).double()
        count = torch.full((x.shape[1],), float(pairs.lengths.sum()) * x.shape[-1], dtype=held.dtype, device=x.device)
        found[at] = torch.stack([count, held.sum((0, 2, 3)), held.square().sum((0, 2, 3))])
    return found


def _spread(moments: Sequence[Mapping[Place, Tensor]]) -> dict[Place, Tensor]:
    """Standard deviations over all of them: (head or 1,)."""
    sums = {at: torch.stack([one[at] for one in moments]).sum(0) for at in moments[0]}
    return {at: (squares / n - (total / n).square()).clamp(min=0).sqrt() for at, (n, total, squares) in sums.items()}


def _noised(x: Tensor, sigma: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
    noise = torch.stack([torch.randn(x.shape[1:], generator=draw) for draw in draws]).to(x)
    return x + 3 * (sigma[:, None, None] if x.ndim == 4 else sigma).to(x) * noise
