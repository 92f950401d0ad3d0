"""Attribution patching: what patching would do to first order, for all heads, from two passes and a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.stream import StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.gradients import frozen
from headscope.probes.patching.activation import UNIT, Direction, numbers, patch_heads
from headscope.probes.patching.pairs import Metric, Pairs, logit_difference, measure, share
from headscope.probes.patching.places import COMPONENTS, INPUTS, Place, Places, by_head, layers_of

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
    once, where they patch one key at a time. Their other fix, dropout of gradients, is not here.

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
        HeadscopeError: as ``patch_heads``; a fix that is not one of q or k; the model computes without gradients.
    """
    lm = load_model(lm)
    if component not in COMPONENTS or (fix == "qk" and component not in ("q", "k")) or fix not in ("none", "qk"):
        raise HeadscopeError(f"no attribution of {component!r} with fix={fix!r}: q, k, v or z; 'qk' fixes q and k")
    if steps < 1:
        raise HeadscopeError(f"steps={steps}: integrate over at least 1 step")
    at = "z" if fix == "qk" else component
    sites = [at, *(["mlp_out"] if mlps else [])]
    heads, layers_mlp, bases, others = [], [], [], []
    for part in track(pairs.batches(batch_size), "attribution", enabled=progress):
        where = part.where(positions)
        seen = Linear(lm, part, sites, direction, metric, steps, (component, where) if fix == "qk" else None)
        values = np.full((len(part), lm.info.layers, lm.info.heads), np.nan)
        for layer in layers_of(seen.grads, at):
            moved = seen.moved[layer] if fix == "qk" else seen.difference(at, layer)
            values[:, layer] = _dot(moved, seen.grads[at, layer], part.real if fix == "qk" else where)
        heads.append(values)
        if mlps:
            found = [
                _dot(seen.difference("mlp_out", n), seen.grads["mlp_out", n], where)
                for n in layers_of(seen.grads, "mlp_out")
            ]
            layers_mlp.append(np.stack(found, 1))
        bases.append(seen.base)
        others.append(seen.other)
    base, other = np.concatenate(bases), np.concatenate(others)
    trials = share(np.concatenate(heads) + base[:, None, None], base, other, normalize=normalize)
    mlp = share(np.concatenate(layers_mlp) + base[:, None], base, other, normalize=normalize) if mlps else None
    made = provenance(lm, prompts=pairs.texts, component=component, positions=str(positions), direction=direction,
                      fix=fix, steps=steps, sample=sample, seed=seed)  # fmt: skip
    unit = UNIT[direction] if normalize else "metric"
    scores = HeadScores(f"attribution_{component}", trials, made | {"unit": unit})
    true = None
    if sample:
        asked = sampled(scores, sample, seed)
        true = patch_heads(lm, pairs, component, positions, heads=asked, direction=direction, metric=metric,
                           normalize=normalize, batch_size=batch_size, progress=progress)  # fmt: skip
    return Attribution(scores, 1 + steps, steps, mlp, true, None if true is None else correlation(scores, true))


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


class Linear:
    """What the first order needs of some pairs: ``own`` and ``given``, what passed the sites in the run that is patched
    and in the other; ``grads``, the gradient of each pair's metric in the first; ``base`` and ``other`` (example,) the
    metric. One forward pass of the other run, and one forward and one backward a step."""

    def __init__(
        self,
        lm: LanguageModel,
        pairs: Pairs,
        sites: Sequence[str],
        direction: Direction,
        metric: Metric,
        steps: int = 1,
        recompute: tuple[str, Tensor] | None = None,
    ) -> None:
        if direction not in UNIT:
            raise HeadscopeError(f"direction is 'denoise' or 'noise', not {direction!r}")
        ids, other_ids = pairs.corrupt, pairs.clean
        if direction == "noise":
            ids, other_ids = other_ids, ids
        entering = ("resid_pre",) if steps > 1 else ()
        other = Places(keep=(*sites, *entering, *(recompute[:1] if recompute else ())))
        self.other = numbers(measure(lm, pairs, other_ids, other, metric))[0]
        self.given, self.grads, first = other.kept, dict[Place, Tensor](), 0
        self.own: dict[Place, Tensor] = {}
        for j in range(steps):
            leaves = Leaves(sites, entering, self.given, recompute if j == 0 else None)
            if j:
                start, end = self.own["resid_pre", first], self.given["resid_pre", first]
                leaves.entering = (first, start + j / steps * (end - start))
            with frozen(lm), torch.enable_grad():
                said = measure(lm, pairs, ids, leaves, metric, grad=True)[0]
                found = torch.autograd.grad(said.sum(), list(leaves.leaves.values()))
            if j == 0:
                self.base, self.own, self.moved = numbers(said), leaves.kept, leaves.moved
                first = min(layers_of(self.own, "resid_pre"), default=0)
            for at, grad in zip(leaves.leaves, found, strict=True):
                self.grads[at] = self.grads[at] + grad / steps if at in self.grads else grad / steps

    def difference(self, site: str, layer: int) -> Tensor:
        """What patching would add."""
        return self.given[site, layer] - self.own[site, layer]


class Leaves(Places):
    """Adds a zero to every value at the sites, whose gradient is the gradient there; moves what enters the model where
    ``entering`` says to; attends once more with the other run's q or k where ``recompute`` says to (``moved``)."""

    def __init__(
        self,
        sites: Sequence[str],
        keep: Sequence[str],
        given: Mapping[Place, Tensor],
        recompute: tuple[str, Tensor] | None,
    ) -> None:
        super().__init__(keep=(*sites, *keep))
        self.sites, self.given, self.recompute = frozenset(sites), given, recompute
        self.entering: tuple[int, Tensor] | None = None
        self.leaves: dict[Place, Tensor] = {}
        self.moved: dict[int, Tensor] = {}

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Change q, k and v: every query head has keys and values of its own here."""
        if not self.sites & set(INPUTS):
            return call
        return call.with_(**{INPUTS[site]: self._pass(site, call.layer, x) for site, x in by_head(call).items()})

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """Keep z' - z of a recomputed pattern, and change z."""
        if self.recompute is not None:
            site, where = self.recompute
            with torch.no_grad():
                new = {INPUTS[name]: x.detach() for name, x in by_head(call).items()}
                held = where.to(z.device)[:, None, :, None]
                new[INPUTS[site]] = torch.where(held, self.given[site, call.layer], new[INPUTS[site]])
                self.moved[call.layer] = call.with_(**new).output() - z.detach()
        return self._pass("z", call.layer, z)

    def stream(self, call: StreamCall) -> Tensor:
        """Put in what enters the first layer, and change the rest."""
        x = call.x
        if call.place == "resid_pre" and self.entering is not None and call.layer == self.entering[0]:
            x = self.entering[1].to(x)
        return self._pass(call.place, call.layer, x)

    def _pass(self, site: str, layer: int, x: Tensor) -> Tensor:
        if site in self.keep:
            self.kept[site, layer] = x.detach()
        if site not in self.sites:
            return x
        self.leaves[site, layer] = leaf = torch.zeros_like(x, requires_grad=True)
        return x + leaf


def _dot(moved: Tensor, grad: Tensor, where: Tensor) -> NDArray[np.float64]:
    """Sums over the tokens of ``where`` and dimensions: (example, head), or (example,)."""
    held = where.to(grad.device)[:, None, :, None] if grad.ndim == 4 else where.to(grad.device)[..., None]
    product = torch.where(held, moved.double() * grad.double(), 0)
    found: NDArray[np.float64] = product.sum((-2, -1)).cpu().numpy()
    return found
