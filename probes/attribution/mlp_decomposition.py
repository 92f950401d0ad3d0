"""What an MLP does to the heads before it: its output as a weighted sum of theirs, fitted over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.gradients import frozen
from headscope.interp.sites.sizes import tower_size
from headscope.probes.lenses.attribution import read_last
from headscope.probes.paths.rows import wrote
from headscope.probes.paths.writers import find_paths

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MLPDecomposition:
    """m = sum_h w_h o_h + w_r r + b of one layer's MLP at prompts' last tokens.

    Attributes:
        weights: (head + 1,) w of every head of the layer, then of the stream before the layer. A negative one says that
            the MLP takes away what the head wrote, a positive one that it adds to it.
        low, high: (head + 1,) 95 % percentile bootstrap over prompts, tasks kept.
        r2: share of the variance over prompts that the weighted sum explains, all dimensions together; b explains none
            of it. Where it is low the weights say little.
        function: (task, d_model) b, what the MLP adds whatever the prompt of a task: read it through the unembedding.
        tasks: their names, in order.
    """

    weights: Array
    low: Array
    high: Array
    r2: float
    function: NDArray[np.float32]
    tasks: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: part ("H0", ..., "stream"), weight, ci_low, ci_high."""
        parts = [*(f"H{head}" for head in range(len(self.weights) - 1)), "stream"]
        return pd.DataFrame({"part": parts, "weight": self.weights, "ci_low": self.low, "ci_high": self.high})


def mlp_decomposition(
    model: Loadable,
    prompts: Sequence[str],
    layer: int,
    tasks: Sequence[str] | None = None,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> MLPDecomposition:
    """Fit one weight a head to what an MLP writes at the last token, after Lv et al. 2024 (arXiv 2403.19521).

    They find by linear regression, with an intercept for each task, that MLPs erase or amplify single heads. What of it
    is ours [OURS], as the paper's regressors are not published in full: the parts are the heads of the MLP's own layer
    (W_O z, a norm after them held still) and the stream before the layer; one scalar each, one vector b a task;
    ordinary least squares over prompts and dimensions together, on what differs from a task's mean, then b = the mean
    of the rest. "After Lv et al.", no reproduction.

    What it does not show: that the MLP computes this (it is not linear, and parts that go together share weights); what
    earlier layers' heads wrote is in the stream's one weight.

    Args:
        model: load_model's result, or what it takes.
        prompts: of one kind, read at their last token; more than three times as many as heads steady the fit.
        layer: of the MLP.
        tasks: the task of each prompt (a relation); None: all are of one.
        resamples, seed: of the bootstrap.

    Raises:
        HeadscopeError: fewer than two prompts in a task, or a layer without heads or an MLP that adds to the stream.
    """
    lm = load_model(model)
    names = ["all"] * len(prompts) if tasks is None else list(tasks)
    kinds = tuple(dict.fromkeys(names))
    groups = [[i for i, name in enumerate(names) if name == kind] for kind in kinds]
    if len(names) != len(prompts) or not groups or min(map(len, groups)) < 2:
        raise HeadscopeError("mlp_decomposition: give a task to each prompt, and two prompts or more of each task")
    tower_size(lm).check_layers([layer])
    paths = find_paths(lm)
    path = next(one for one in paths.layers if one.layer == layer)
    if path.attention is None or path.mlp is None:
        raise HeadscopeError(f"layer {layer} of {lm.name} has no heads, or no MLP that adds to the stream")
    parts, whole = list[Tensor](), list[Tensor]()
    with frozen(lm), torch.no_grad():
        for prompt in prompts:
            found = read_last(lm, paths, [prompt])
            heads, _ = wrote(path, found, 0)
            parts.append(torch.cat([heads[0], found.before[layer][0].to(heads)]).double().cpu())
            whole.append(found.mlp[layer][0, 0].double().cpu())
    x, m = torch.stack(parts), torch.stack(whole)  # (prompt, part, d_model), (prompt, d_model)
    weights, r2 = _fit(x, m, groups)
    draws, rng = [], np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = [rng.choice(group, len(group)).tolist() for group in groups]
        draws.append(_fit(x, m, drawn)[0])
    low, high = np.quantile(draws, [0.025, 0.975], axis=0) if draws else (np.full(len(weights), np.nan),) * 2
    rest = m - torch.einsum("npd,p->nd", x, torch.from_numpy(weights))
    function = torch.stack([rest[group].mean(0) for group in groups]).float().numpy()
    made = provenance(lm, seed=seed, prompts=prompts, layer=layer, tasks=names)
    return MLPDecomposition(weights, low, high, r2, function, kinds, made)


def _fit(x: Tensor, m: Tensor, groups: Sequence[Sequence[int]]) -> tuple[Array, float]:
    """Weights (part,) and R^2 of what differs from the means of the groups, by least squares (of least norm where
    parts do not vary)."""
    centred = [(x[group] - x[group].mean(0), m[group] - m[group].mean(0)) for group in groups]
    a = torch.cat([one.transpose(1, 2).reshape(-1, x.shape[1]) for one, _ in centred]).numpy()
    b = torch.cat([one.reshape(-1) for _, one in centred]).numpy()
    weights: Array = np.linalg.lstsq(a.T @ a, a.T @ b, rcond=1e-12)[0]
    left, total = float(((b - a @ weights) ** 2).sum()), float((b**2).sum())
    return weights, 1 - left / total if total else float("nan")
