"""Linear probes: what each head's output says about a label, as ITI fits them.

Li et al. 2023, "Inference-Time Intervention" (arXiv 2306.03341), section 3.2, and ``utils.train_probes`` of its code:
for every head a scikit-learn LogisticRegression (max_iter 1000, L2 with C = 1, no scaling) on z, the head's output
before the output projection, at the last token; 80/20 split by question; validation accuracy is the head's score.

Beyond the paper: several splits, bootstrap intervals over questions, a shuffled-label control fitted alike, and a bag
of words on the same splits. Differences: the split is scikit-learn's GroupShuffleSplit, not ``np.random.choice``, and
sigma (see ``Directions``) is taken over the probed texts instead of a second set of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.files import folder_of
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.probes.linear.activations import head_outputs
from headscope.probes.linear.dataset import Labelled, load_labelled
from headscope.probes.linear.fitting import Fitted, Settings, Split, fit_heads, shuffle_labels, split, surface_baselines
from headscope.probes.linear.result import Directions, ProbeResult


def probe_heads(
    lm: LanguageModel,
    dataset: Labelled | str | Path = "truth",
    *,
    positions: Sequence[int] = (-1,),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    validation: float = 0.2,
    max_iter: int = 1000,
    C: float = 1.0,
    scale: bool = False,
    batch_size: int = 32,
    out: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Probe every head of a model for a label.

    Args:
        lm: load_model's result, or what load_model takes.
        dataset: a ``Labelled`` set, the name of a generated one, or a file (see ``load_labelled``).
        positions: where z is read, from a text's start or, negative, from its end; -1 is ITI's last token. The outputs
            at several positions are one probe's features, side by side.
        seeds: one split, and one shuffle for the control, each.
        validation: share of the groups held out.
        max_iter, C, scale: see ``Settings``; the defaults are ITI's.
        batch_size: texts a forward pass.
        out: folder for the result (as ``ProbeResult.save`` writes it) and for the heads' outputs, with which an
            interrupted run goes on.
        jobs: threads that fit probes (default: the available processors).

    Raises:
        HeadscopeError: see ``head_outputs``, ``Labelled`` and ``Settings``.
    """
    settings = Settings(tuple(int(seed) for seed in seeds), validation, max_iter, C, scale)
    out, lm, labelled = folder_of(out), load_model(lm), load_labelled(dataset)
    z = head_outputs(lm, labelled.texts, positions=positions, batch_size=batch_size, out=out, progress=progress)
    made = provenance(lm, prompts=labelled.texts, positions=list(positions), batch_size=batch_size)
    result = probe_activations(z, labelled, settings=settings, made=made, jobs=jobs, progress=progress)
    if out is not None:
        result.save(out)
    return result


def probe_activations(
    z: NDArray[np.floating],
    dataset: Labelled,
    *,
    settings: Settings | None = None,
    made: dict[str, Any] | None = None,
    jobs: int | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Probe head outputs that are at hand: ``z`` (example, layer, head, d_head) or (..., position, d_head).

    ``made`` is the provenance to extend. Raises HeadscopeError where ``z`` does not fit ``dataset`` or is not finite.
    """
    settings = settings or Settings()
    features, shape = _features(z, dataset)
    splits = [split(dataset, seed, settings.validation) for seed in settings.seeds]
    shuffled = [shuffle_labels(dataset, seed) for seed in settings.seeds]
    fits: dict[str, list[Fitted]] = {"scores": [], "control": []}
    work = [(kind, index) for index in range(len(splits)) for kind in fits]
    for kind, index in track(work, f"probes for {dataset.name}", enabled=progress):
        labels = dataset.labels if kind == "scores" else shuffled[index]
        fits[kind].append(fit_heads(features, labels, splits[index], settings, jobs))
    made = _describe(made, dataset, settings, fits)
    baselines = surface_baselines(dataset, splits, settings)
    made["baselines"] = {name: accuracy.tolist() for name, accuracy in baselines.items()}
    scores = _scores(f"probe_{dataset.name}", dataset, settings, splits, fits["scores"], shape, made)
    control = _scores(f"probe_{dataset.name}_control", dataset, settings, splits, fits["control"], shape, made)
    return ProbeResult(scores, control, _directions(features, dataset, settings, shape, jobs))


def _features(z: NDArray[np.floating], dataset: Labelled) -> tuple[NDArray[np.floating], tuple[int, int]]:
    """Features (example, layer * head, d) and (layer, head)."""
    if z.ndim not in (4, 5) or len(z) != len(dataset):
        raise HeadscopeError(
            f"z of shape {z.shape} does not fit {len(dataset)} texts; give (example, layer, head[, position], d_head)"
        )
    if not np.isfinite(z).all():
        raise HeadscopeError("z holds values that are not finite numbers; trace these texts in float32")
    return np.ascontiguousarray(z).reshape(len(z), z.shape[1] * z.shape[2], -1), (z.shape[1], z.shape[2])


def _describe(
    made: dict[str, Any] | None, dataset: Labelled, settings: Settings, fits: dict[str, list[Fitted]]
) -> dict[str, Any]:
    made = dict(made) if made is not None else provenance(prompts=dataset.texts)
    made["parameters"] = {**made.get("parameters", {}), **vars(settings), "seeds": list(settings.seeds)}
    made["dataset"] = {
        "name": dataset.name,
        "meaning": dataset.meaning,
        "examples": len(dataset),
        "groups": len(set(dataset.groups)),
        "share_of_label_1": dataset.balance,
        "sha256": dataset.sha256,
    }
    made["unconverged"] = sum(fit.unconverged for kind in fits.values() for fit in kind)
    return made


def _scores(
    method: str,
    dataset: Labelled,
    settings: Settings,
    splits: Sequence[Split],
    fits: Sequence[Fitted],
    shape: tuple[int, int],
    made: dict[str, Any],
) -> HeadScores:
    """Head scores whose trials are held-out examples, resampled by group."""
    rows = np.concatenate([held_out for _, held_out in splits])
    correct = np.concatenate([fit.correct for fit in fits]).astype(np.float64).reshape(len(rows), *shape)
    details = tuple(
        {"seed": seed, "example": int(example), "group": dataset.groups[example]}
        for seed, (_, held_out) in zip(settings.seeds, splits, strict=True)
        for example in held_out
    )
    return HeadScores(method, correct, made, dataset.group_index[rows], details)


def _directions(
    features: NDArray[np.floating], dataset: Labelled, settings: Settings, shape: tuple[int, int], jobs: int | None
) -> Directions:
    """Directions of every head from all examples."""
    everything = (np.arange(len(dataset)), np.arange(0))
    fit = fit_heads(features, dataset.labels, everything, settings, jobs)
    x = features.astype(np.float64)
    theta = x[dataset.labels == 1].mean(axis=0) - x[dataset.labels == 0].mean(axis=0)
    along, weight_along = unit(theta), unit(fit.weight)
    arrays = {
        "mass_mean": along.reshape(*shape, -1),
        "mass_mean_norm": np.linalg.norm(theta, axis=-1).reshape(shape),
        "mass_mean_sigma": spread(x, along).reshape(shape),
        "probe_weight": fit.weight.reshape(*shape, -1),
        "probe_bias": fit.bias.reshape(shape),
        "probe_sigma": spread(x, weight_along).reshape(shape),
    }
    return Directions(**{name: array.astype(np.float32) for name, array in arrays.items()})


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vectors (head, d) of length 1; a zero vector stays zero."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1.0)


def spread(x: NDArray[np.float64], direction: NDArray[np.float64], ddof: int = 1) -> NDArray[np.float64]:
    """Standard deviation (n - ``ddof``; (head,)) over the examples of x (example, head, d) along each head's
    direction."""
    along = np.einsum("nhd,hd->nh", x, direction)
    return np.asarray(along.std(axis=0, ddof=ddof))
