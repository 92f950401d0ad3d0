"""Attribution patching: what patching would do to first order, for all heads, from two passes and a gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.registry import check_counts
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.probes.patching.activation import UNIT, Direction, patch_heads
from headscope.probes.patching.linear import Gradients, Linear, dot
from headscope.probes.patching.pairs import Metric, Pairs, logit_difference, share
from headscope.probes.patching.places import COMPONENTS, layers_of

Fix = Literal["none", "qk"]


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """``scores`` of heads by attribution patching, ``mlps`` (pair, layer) those of MLPs where asked for, and what they
    cost: ``forwards`` and ``backwards``, passes over the prompts.

    ``true`` are the scores of true patching for a sample of heads, and ``correlation`` is Spearman's between the two on
    it, the estimate's error bar: {"spearman", "heads"}; None where no sample was asked for.
    """

    scores: HeadScores
    forwards: int
    backwards: int
    mlps: NDArray[np.float64] | None = None
    true: HeadScores | None = None
    correlation: dict[str, float] | None = None

    def __repr__(self) -> str:
        held = "" if self.correlation is None else f", Spearman {self.correlation['spearman']:.3f} with true patching"
        return f"Attribution({self.scores!r}, {self.forwards} forward, {self.backwards} backward{held})"


def attribution_patching(
    lm: LanguageModel,
    pairs: Pairs,
    component: str = "z",
    positions: Any = None,
    *,
    fix: Fix = "none",
    dropout: bool = False,
    steps: int = 1,
    mlps: bool = False,
    sample: int = 0,
    direction: Direction = "noise",
    metric: Metric = logit_difference,
    normalize: bool = True,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Attribution:
    """Every head's effect as ``patch_heads`` would find it, to first order: (source - base) . dL/dz.

    Nanda 2023, "Attribution Patching"; Kramar et al. 2024, AtP* (arXiv 2403.00745). Under ``"noise"`` base is the
    clean run, the difference (corrupt - clean); under ``"denoise"`` the other way round. Two forward passes and one
    backward, for all heads at once, at any length: no map is made. Scores have ``patch_heads``' sign and unit.

    ``fix="qk"`` (theirs), for q and k, where a saturated softmax has no gradient: the head's pattern is
    recomputed with the patched q (or k), and only what follows is linear, (A(q') - A) . dL/dA. As dL/dA[i, j] =
    dL/dz[i] . v[j], that is (z(q', k, v) - z) . dL/dz, so nothing quadratic is held. All positions of k are patched at
    once, where they patch one key at a time.

    ``dropout`` (theirs, GradDrop; with ``fix="qk"`` it is AtP*), for effects that cancel between the direct way and one
    through later layers: for each of the L layers the gradient is taken anew with none coming through what that layer
    (attention and MLP) adds to the stream, and the score is sum_l |estimate_l| / (L - 1) in each pair, as a node's own
    layer leaves it nothing. L backward passes more; scores are magnitudes, and so are the true ones beside them. What
    differs: a node of theirs is one token's; here the sizes are of a head's sum over ``positions``.

    ``steps`` > 1: integrated gradients (EAP-IG: Hanna et al. 2024, arXiv 2403.17806, for nodes): dL/dz is the mean
    over ``steps`` points, base + j / steps (source - base), j = 0 ... steps - 1, of what enters the first layer; one
    step is the plain estimate. A forward and a backward pass more for each.

    What it does not show: effects that cancel to first order; heads where the metric is far from linear between the two
    runs. ``sample`` heads say how well it does.

    Args:
        lm: load_model's result, or what load_model takes.
        component, positions, metric, normalize: as in ``patch_heads``.
        mlps: also score what MLPs add to the stream.
        sample: so many heads, drawn at random, are patched truly as well; their forward passes are not in ``forwards``.

    Raises:
        HeadscopeError: as ``patch_heads``; a fix that is not one of q or k; dropout of integrated gradients; the model
            computes without gradients.
    """
    lm = load_model(lm)
    if component not in COMPONENTS or (fix == "qk" and component not in ("q", "k")) or fix not in ("none", "qk"):
        raise HeadscopeError(f"no attribution of {component!r} with fix={fix!r}: q, k, v or z; 'qk' fixes q and k")
    check_counts(1, steps=steps)
    check_counts(0, sample=sample)
    if dropout and steps > 1:
        raise HeadscopeError(f"dropout=True goes with one step, not steps={steps}: choose one of the two")
    at = "z" if fix == "qk" else component
    sites = [at, *(["mlp_out"] if mlps else [])]
    heads, layers_mlp, bases, others = [], [], [], []
    parts = list(zip(pairs.batches(batch_size), pairs.where(positions).split(batch_size), strict=True))
    for part, where in track(parts, "attribution", enabled=progress):
        recompute = (component, where) if fix == "qk" else None
        seen = Linear(lm, part, sites, direction, metric, steps, recompute, dropout)
        of_heads, of_mlps = _estimates(lm, seen, at, part.real if fix == "qk" else where, where, dropout)
        heads.append(of_heads)
        layers_mlp.append(of_mlps)
        bases.append(seen.base)
        others.append(seen.other)
    base, other = np.concatenate(bases), np.concatenate(others)
    trials = share(np.concatenate(heads) + base[:, None, None], base, other, normalize=normalize)
    mlp = share(np.concatenate(layers_mlp) + base[:, None], base, other, normalize=normalize) if mlps else None
    if dropout:  # a share of a difference that may be negative
        trials, mlp = np.abs(trials), None if mlp is None else np.abs(mlp)
    made = provenance(lm, prompts=pairs.texts, component=component, positions=str(positions), direction=direction,
                      fix=fix, dropout=dropout, steps=steps, sample=sample, seed=seed)  # fmt: skip
    unit = UNIT[direction] if normalize else "metric"
    scores = HeadScores(f"attribution_{component}", trials, made | {"unit": unit})
    true = None
    if sample:
        asked = sampled(scores, sample, seed)
        true = patch_heads(lm, pairs, component, positions, heads=asked, direction=direction, metric=metric,
                           normalize=normalize, batch_size=batch_size, progress=progress)  # fmt: skip
        true = replace(true, trials=np.abs(true.trials)) if dropout else true
    backwards = steps + (lm.info.layers if dropout else 0)
    return Attribution(scores, 1 + steps, backwards, mlp, true, None if true is None else correlation(scores, true))


def _estimates(
    lm: LanguageModel, seen: Linear, at: str, held: Tensor, where: Tensor, dropout: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of heads (pair, layer, head), NaN in those that do not attend, and of MLPs (pair, layer)."""
    if not dropout:
        return _estimate(lm, seen, seen.grads, at, held, where)
    found = [_estimate(lm, seen, grads, at, held, where) for grads in seen.dropped()]  # one a layer
    heads, mlps = (np.abs(np.stack(x)).sum(0) / (len(found) - 1) for x in zip(*found, strict=True))
    return heads, mlps


def _estimate(
    lm: LanguageModel, seen: Linear, grads: Gradients, at: str, held: Tensor, where: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values = np.full((len(where), lm.info.layers, lm.info.heads), np.nan)
    for layer in layers_of(grads, at):
        moved = seen.moved[layer] if seen.moved else seen.difference(at, layer)
        values[:, layer] = dot(moved, grads[at, layer], held)
    mlps = [
        dot(seen.difference("mlp_out", layer), grads["mlp_out", layer], where) for layer in layers_of(grads, "mlp_out")
    ]
    return values, np.stack(mlps, 1) if mlps else np.zeros((len(where), 0))


def correlation(estimate: HeadScores, true: HeadScores) -> dict[str, float]:
    """Spearman's rank correlation of two scores over the heads that have both.

    Raises:
        HeadscopeError: fewer than three heads have both.
    """
    both = ~np.isnan(estimate.mean) & ~np.isnan(true.mean)
    if both.sum() < 3:
        raise HeadscopeError(f"{int(both.sum())} heads have both scores, too few to rank: sample at least 3")
    found = spearmanr(estimate.mean[both], true.mean[both]).statistic
    return {"spearman": float(found), "heads": int(both.sum())}


def sampled(scores: HeadScores, count: int, seed: int) -> HeadSet:
    """Heads with a score, drawn without looking at it."""
    there = np.argwhere(scores.n > 0)
    drawn = np.random.default_rng(seed).permutation(len(there))[:count]
    return HeadSet(tuple((int(layer), int(head)) for layer, head in there[np.sort(drawn)]), name="sample")
