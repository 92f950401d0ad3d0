"""The fewest forward passes for several measured methods: those that read the same sample share the pass over it.

What each of them records stands in one record under its name, and every method is handed its own part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import xarray as xr

from headscope.interp.heads.base import Measured, Scored
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample
from headscope.interp.records.labels import own
from headscope.interp.statistics import Statistic
from headscope.interp.tracing.recording import trace

_Key = tuple[tuple[int | str, ...], ...]  # one view's tokens and other inputs after the other


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one length that the same ``methods`` wait for, with their ``views`` (sample, view).

    ``trials`` (method, sample) is the index of each sample among a method's own trials.
    """

    methods: tuple[Measured, ...]
    samples: tuple[tuple[Sample, ...], ...]  # (method, sample): each method's own, whose trials may differ in words
    views: tuple[tuple[Sample, ...], ...]
    trials: tuple[tuple[int, ...], ...]

    def bare(self) -> Batch:
        """Without the methods, which may hold what they made of a model."""
        return replace(self, methods=())


def batches(lm: LanguageModel, waiting: Sequence[tuple[Measured, Sequence[int]]]) -> list[Batch]:
    """The forward passes that give every waiting trial of every method; each distinct sample is run once."""
    wanted: dict[_Key, list[tuple[int, Sample, int]]] = {}  # by what is run: (method, sample, trial)
    views: dict[_Key, tuple[Sample, ...]] = {}
    for number, (method, trials) in enumerate(waiting):
        samples = method.prepare(lm) if trials else []
        for trial in trials:
            seen = method.views(lm, samples[trial])
            key = tuple(view.key for view in seen)
            views.setdefault(key, seen)
            wanted.setdefault(key, []).append((number, samples[trial], trial))
    alike: dict[tuple[Any, ...], list[_Key]] = {}
    for key, who in wanted.items():
        alike.setdefault((tuple(n for n, _, _ in who), tuple(view.shape for view in views[key])), []).append(key)
    found = []
    for (numbers, _), keys in alike.items():
        methods = tuple(waiting[n][0] for n in numbers)
        for part in _chunks(keys, min(method.batch for method in methods)):
            members = list(zip(*(wanted[key] for key in part), strict=True))  # (method, sample)
            samples_of = tuple(tuple(sample for _, sample, _ in one) for one in members)
            trials_of = tuple(tuple(trial for _, _, trial in one) for one in members)
            found.append(Batch(methods, samples_of, tuple(views[key] for key in part), trials_of))
    return found


def run(lm: LanguageModel, batch: Batch) -> Iterator[tuple[Measured, list[Scored]]]:
    """Scores of a batch's samples, method by method: one forward pass a view."""
    asked = [_asked(batch.methods, view) for view in zip(*batch.views, strict=True)]
    records = [record_of(lm, view, found) for view, found in zip(zip(*batch.views, strict=True), asked, strict=True)]
    for method, samples in zip(batch.methods, batch.samples, strict=True):
        parts = records if len(batch.methods) == 1 else [own(record, method.name) for record in records]
        yield method, method.reduce(lm, samples, *parts)


def _asked(methods: Sequence[Measured], view: Sequence[Sample]) -> list[Statistic]:
    """What all methods record of a view; of several, each under its own name."""
    if len(methods) == 1:
        return methods[0].statistics(view)
    return [
        replace(statistic, label=method.name if statistic.label is None else f"{method.name}.{statistic.label}")
        for method in methods
        for statistic in method.statistics(view)
    ]


def record_of(lm: LanguageModel, samples: Sequence[Sample], statistics: Sequence[Statistic]) -> xr.Dataset:
    """One forward pass over samples of one length (so without padding), recorded."""
    ids = torch.stack([sample.ids for sample in samples]).to(lm.device)
    inputs = {name: torch.cat([sample.inputs[name] for sample in samples]) for name in samples[0].inputs}
    with trace(lm, statistics) as tracer:
        lm.forward(ids, logits=1, cache=False, **inputs)  # logits are not looked at
    return tracer.record


def _chunks(keys: list[_Key], size: int) -> Iterator[list[_Key]]:
    for first in range(0, len(keys), size):
        yield keys[first : first + size]
