"""Samples through a traced model, several in one forward pass, one trial each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.discovery import Scored, discover
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.prompts.sequences import Sample
from headscope.interp.prompts.tokens import bos_tokens
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.journal import Trial
from headscope.interp.runs.provenance import hash_texts
from headscope.interp.statistics import Statistic, TargetMass
from headscope.interp.tracing.tracer import trace

Text = str | Sequence[str]
Method = TypeVar("Method", bound=Callable[..., HeadScores])
SETTINGS = """

Args:
    lm: load_model's result, or what load_model takes.
    text: read this text (or these) instead of random tokens, in consecutive windows, each with the tokenizer's
        default special tokens before it; trials of one text are resampled together where there are several.
    length: random tokens before the repetition.
    window: tokens a window of text.
    samples: sequences, each from a seed of its own, or windows of text at most; each is a trial.
    bos: put the tokenizer's BOS token, if it has one, before the random tokens.
    batch: samples in one forward pass; it changes nothing but memory and time.
    out: folder for ``METHOD.json`` and ``.parquet`` and the journal that makes the run resumable.

Returns:
    HeadScores with one trial (layer, head) a sample, in [0, 1]; its details say how many queries it averages.

Raises:
    HeadscopeError: a setting out of range, a text shorter than ``window`` tokens, a sequence longer than the
        model's context, no query with a target, a model that cannot be traced exactly or that gives NaN.
"""


def record_of(lm: LanguageModel, samples: Sequence[Sample], statistics: Sequence[Statistic]) -> xr.Dataset:
    """One forward pass over samples of one length (so without padding), recorded."""
    known = inspect.signature(lm.model.forward).parameters
    options = {"use_cache": False, "logits_to_keep": 1}  # logits are not looked at
    ids = torch.stack([sample.ids for sample in samples]).to(lm.device)
    with trace(lm, statistics) as tracer:
        lm.model(input_ids=ids, **{name: value for name, value in options.items() if name in known})
    return tracer.record


def by_head(lm: LanguageModel, record: xr.Dataset, values: NDArray[Any]) -> NDArray[np.float64]:
    """``values`` (recorded layer, head, ...) by the model's own layer index, NaN in layers without attention.

    Raises:
        HeadscopeError: a value is not a number.
    """
    layers = record["layer"].to_numpy()
    broken = ~np.isfinite(values.reshape(len(layers), -1)).all(axis=1)
    if broken.any():
        raise HeadscopeError(
            f"the attention of layer {layers[broken][0]} of {lm.name} is not a number in {lm.info.dtype}: "
            "load it with dtype='float32', or check its weights"
        )
    full = np.full((lm.info.layers, *values.shape[1:]), np.nan)
    full[layers] = values
    return full


def in_batches(
    samples: Sequence[Sample], run: Callable[[Sequence[Sample]], list[Scored]], batch: int
) -> Callable[[Trial], Scored]:
    """``score`` for ``discover``: a trial is computed together with the next ``batch - 1`` samples."""
    if batch < 1:
        raise HeadscopeError(f"batch={batch}: run at least 1 sample in a forward pass")
    ready: dict[int, Scored] = {}

    def score(trial: Trial) -> Scored:
        at = trial["sample"]
        if at not in ready:
            chunk = samples[at : at + batch]
            ready.clear()
            ready.update(zip(range(at, at + len(chunk)), run(chunk), strict=True))
        return ready[at]

    return score


def with_settings(method: Method) -> Method:
    """Add to a method's docstring what all methods that call ``target_scores`` have in common."""
    method.__doc__ = inspect.cleandoc(method.__doc__ or "") + SETTINGS
    return method


def target_scores(
    method: str,
    model: Any,
    targets: Callable[[Tensor], Tensor],
    *,
    text: Text | None,
    length: int,
    window: int,
    samples: int,
    bos: bool,
    batch: int,
    seed: int,
    out: str | Path | None,
    progress: bool,
) -> HeadScores:
    """Score heads by the mass that queries put on one key each, averaged over the queries that have one.

    ``targets`` gives a sample's table of keys from its token ids (see ``sequences``). The samples are repeated random
    tokens, or windows of ``text``; a sample without any target is run but not kept.
    """
    lm = load_model(model)
    group = "sample"
    parameters: dict[str, Any] = {"input": "repeated" if text is None else "text", "samples": samples}
    if text is None:
        found = sequences.repeated_samples(lm, length, samples, seed, bos=bos)
        parameters |= {"length": length, "bos_token_ids": bos_tokens(lm) if bos else []}
    else:
        texts = [text] if isinstance(text, str) else list(text)
        found = sequences.text_samples(lm, texts, window, samples)
        parameters |= {"window": window, "texts_sha256": hash_texts(texts)}
        group = "text" if len(texts) > 1 else group
    score = in_batches(found, lambda chunk: _target_masses(lm, targets, chunk), batch)
    trials = [sample.trial for sample in found]
    settings: dict[str, Any] = {
        "parameters": parameters,
        "seed": seed,
        "group": group,
        "out": out,
        "progress": progress,
    }
    return discover(method, lm, trials, score, tokens=lambda _: (len(found[0].ids), 0), **settings)


def _target_masses(lm: LanguageModel, targets: Callable[[Tensor], Tensor], samples: Sequence[Sample]) -> list[Scored]:
    table = torch.stack([targets(sample.ids) for sample in samples])
    record = record_of(lm, samples, [TargetMass({"key": table})])
    mass = record["target_mass"].sel(target="key").transpose("example", "layer", "head", "query").to_numpy()
    results: list[Scored] = []
    for one, has in zip(mass, (table >= 0).numpy(), strict=True):
        count = int(has.sum())
        scores = by_head(lm, record, one[..., has].mean(axis=-1, dtype=np.float64)) if count else None
        results.append((scores, {"queries": count}))
    return results
