"""One logistic regression per head: splits by group, label shuffles, and what a bag of words reaches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from headscope.interp.errors import HeadscopeError
from headscope.probes.linear.dataset import Labelled

Split = tuple[NDArray[np.int64], NDArray[np.int64]]  # training, validation examples


@dataclass(frozen=True)
class Settings:
    """How probes are fitted; the defaults are ITI's (see ``headscope.probes.linear.heads``).

    ``seeds`` name the splits, ``validation`` is the share of groups held out, ``max_iter`` and ``C`` (inverse L2
    strength) go to scikit-learn, ``scale`` standardises each dimension by its training mean and deviation first.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    validation: float = 0.2
    max_iter: int = 1000
    C: float = 1.0
    scale: bool = False

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise HeadscopeError(f"seeds must be different numbers, at least one; got {list(self.seeds)}")
        if not 0.0 < self.validation < 1.0:
            raise HeadscopeError(f"validation is the share of groups held out, between 0 and 1; got {self.validation}")
        if self.max_iter < 1 or not self.C > 0:
            raise HeadscopeError(f"max_iter must be 1 or more and C positive; got {self.max_iter} and {self.C}")


@dataclass(frozen=True, eq=False)
class Fitted:
    """Probes of all heads on one split: ``correct`` (validation example, head), ``weight`` (head, d), ``bias`` (head,).

    ``weight`` and ``bias`` apply to unscaled features: label 1 where weight . z + bias > 0.
    """

    correct: NDArray[np.bool_]
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    unconverged: int


def split(dataset: Labelled, seed: int, validation: float) -> Split:
    """Training and validation examples (indices), whole groups on one side: GroupShuffleSplit with ``seed``.

    Raises:
        HeadscopeError: one side lacks a label.
    """
    splitter = GroupShuffleSplit(n_splits=1, test_size=validation, random_state=seed)
    train, held_out = next(splitter.split(dataset.texts, groups=dataset.group_index))
    if any(len(set(dataset.labels[side].tolist())) < 2 for side in (train, held_out)):
        raise HeadscopeError(
            f"{dataset.name}: split {seed} leaves one side with a single label; give more groups or another validation"
        )
    return train, held_out


def shuffle_labels(dataset: Labelled, seed: int) -> NDArray[np.int64]:
    """Labels (example,) that keep the set's structure but say nothing: the control (Hewitt & Liang 2019, 1909.03368).

    In a group with both labels they are permuted within it, so that it keeps its balance (exchanging the labels of
    groups that are all alike would change nothing). Groups of one label exchange their labels with each other.
    """
    rng = np.random.default_rng(seed)
    labels = dataset.labels.copy()
    members = [np.flatnonzero(dataset.group_index == group) for group in range(int(dataset.group_index.max()) + 1)]
    pure = [rows for rows in members if len(set(labels[rows].tolist())) == 1]
    for rows, label in zip(pure, rng.permutation([labels[rows[0]] for rows in pure]), strict=True):
        labels[rows] = label
    for rows in members:
        labels[rows] = rng.permutation(labels[rows])
    return labels


def fit_heads(
    features: NDArray[np.floating], labels: NDArray[np.int64], parts: Split, settings: Settings, jobs: int | None = None
) -> Fitted:
    """Fit one probe per head on ``features`` (example, head, d) and judge it on the validation examples.

    ``jobs`` threads (default: the processors this process may use), each with a single BLAS thread.
    """
    train, held_out = parts

    def fit_one(head: int) -> tuple[NDArray[np.bool_], NDArray[np.float64], float, int]:
        x, scaler = features[:, head], None
        if settings.scale:
            scaler = StandardScaler().fit(x[train])
            x = scaler.transform(x)
        probe = LogisticRegression(max_iter=settings.max_iter, C=settings.C, random_state=settings.seeds[0])
        probe.fit(x[train], labels[train])
        right = probe.predict(x[held_out]) == labels[held_out] if len(held_out) else np.zeros(0, dtype=bool)
        weight, bias = probe.coef_[0].astype(np.float64), float(probe.intercept_[0])
        if scaler is not None:
            weight = weight / scaler.scale_
            bias -= float(weight @ scaler.mean_)
        return right, weight, bias, int(probe.n_iter_[0])

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
        found = Parallel(n_jobs=jobs or available_cores(), backend="threading")(
            delayed(fit_one)(head) for head in range(features.shape[1])
        )
    right, weight, bias, iterations = zip(*found, strict=True)
    late = sum(count >= settings.max_iter for count in iterations)
    return Fitted(np.stack(right, axis=1), np.stack(weight), np.array(bias), late)


def available_cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def surface_baselines(dataset: Labelled, splits: Sequence[Split], settings: Settings) -> dict[str, NDArray[np.float64]]:
    """Validation accuracy (split,) of the same classifier on the text's surface alone.

    ``words``: counts of words and pairs of words (single letters and numbers included); ``characters``: counts of
    1 to 4 characters within words. Where one of them is as good as the probes, the probes need no more than that cue.
    """
    kinds = {
        "words": CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b"),
        "characters": CountVectorizer(analyzer="char_wb", ngram_range=(1, 4)),
    }
    found: dict[str, NDArray[np.float64]] = {}
    for name, counter in kinds.items():
        accuracy = []
        for train, held_out in splits:
            counts = counter.fit_transform([dataset.texts[i] for i in train])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                probe = LogisticRegression(max_iter=settings.max_iter, C=settings.C).fit(counts, dataset.labels[train])
            unseen = counter.transform([dataset.texts[i] for i in held_out])
            accuracy.append(float(probe.score(unseen, dataset.labels[held_out])))
        found[name] = np.array(accuracy)
    return found
