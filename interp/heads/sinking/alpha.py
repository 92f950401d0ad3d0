"""Attention sinks: heads whose queries all look at one position, whatever it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.discovery import Scored, discover
from headscope.interp.heads.passes import Text, by_head, in_batches, record_of
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.prompts.sequences import Sample
from headscope.interp.prompts.tokens import check_length
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.provenance import hash_texts
from headscope.interp.statistics import KeyMass

Inputs = Literal["natural", "random", "repeat"]


def sinks(
    lm: Any,
    *,
    inputs: Inputs = "natural",
    texts: Text | None = None,
    length: int = 64,
    key: int = 0,
    epsilon: float = 0.3,
    samples: int = 100,
    batch: int = 20,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> HeadScores:
    """Score heads by alpha of one key: the attention it receives, averaged over the queries that see it, in [0, 1].

    Gu et al. 2024, "When Attention Sink Emerges in Language Models" (arXiv 2410.10781), section 3: for a sample of T
    tokens alpha_k = 1/(T - k) sum_{i >= k} A[i, k] (0-based; under a sliding window only rows whose window holds k),
    and Sink_k^eps is the percentage of (sample, layer, head) with alpha_k > eps, strictly. The paper's T = 64,
    eps = 0.3, k = first token and 100 samples are the defaults.

    Sink_k^eps of the model is in ``provenance["sink_rate_percent"]``, one number for each k = 0..T-1, and of each
    sample in its details. The last keys are seen by few queries, so their alpha is noisy (a single weight at T-1).

    What it does not show: that the position's content is ignored, or that the head does nothing when it rests there.

    Args:
        lm: load_model's result, or what load_model takes.
        inputs: ``"natural"``: the first ``length`` tokens of each text, with the tokenizer's default special tokens (a
            model whose tokenizer adds BOS has it at k = 0). ``"random"``: different tokens drawn uniformly from the
            vocabulary without special and added ones; ``"repeat"``: one such token ``length`` times; both without BOS.
        texts: natural texts (by default passages of the bundled prose).
        length: T, tokens a sample; a shorter text is refused.
        key: k, the position whose alpha scores a head.
        epsilon: the threshold of Sink_k^eps.
        samples: at most so many; each is a trial, and the intervals resample them.
        batch: samples in one forward pass; it changes nothing but memory and time.
        out: folder for ``sinks.json``, ``sinks.parquet`` and the journal that makes the run resumable.

    Returns:
        HeadScores with one trial (layer, head) a sample.

    Raises:
        HeadscopeError: a setting out of range, a text shorter than ``length`` tokens, a length above the model's
            context, a model that cannot be traced exactly or that gives NaN.
    """
    lm = load_model(lm)
    _check(inputs, texts, length, key, epsilon)
    if inputs == "natural" and texts is None:
        check_length(lm, length)
        texts = sequences.bundled_passages(lm, length, samples)
    found = _samples(lm, inputs, texts, length, samples, seed)
    parameters: dict[str, Any] = {"inputs": inputs, "length": length, "key": key, "epsilon": epsilon}
    parameters |= {"samples": samples, "texts_sha256": None if texts is None else hash_texts(_list(texts))}

    def run(chunk: Sequence[Sample]) -> list[Scored]:
        record = record_of(lm, chunk, [KeyMass("mean")])
        alphas = record["key_mass_mean"].transpose("example", "layer", "head", "key").to_numpy()
        return [
            (by_head(lm, record, alpha)[..., key], {"sink_rate_percent": _rate(alpha, epsilon)}) for alpha in alphas
        ]

    trials = [sample.trial for sample in found]
    score = in_batches(found, run, batch)
    settings: dict[str, Any] = {"parameters": parameters, "seed": seed, "progress": progress, "out": out}
    result = discover("sinks", lm, trials, score, tokens=lambda _: (length, 0), group="sample", **settings)
    rates = np.array([detail["sink_rate_percent"] for detail in result.details])
    result.provenance["sink_rate_percent"] = rates.mean(axis=0).tolist()
    if out is not None:
        result.save(out)
    return result


def _rate(alpha: NDArray[Any], epsilon: float) -> list[float]:
    """Sink_k^eps of one sample's alpha (layer, head, key), in percent, for every key."""
    return [float(rate) for rate in 100.0 * (alpha > epsilon).mean(axis=(0, 1))]


def _check(inputs: str, texts: Text | None, length: int, key: int, epsilon: float) -> None:
    if inputs not in ("natural", "random", "repeat"):
        raise HeadscopeError(f"inputs={inputs!r}: choose 'natural', 'random' or 'repeat'")
    if inputs != "natural" and texts is not None:
        raise HeadscopeError(f"texts are read with inputs='natural', not with inputs={inputs!r}: leave one of them out")
    if not 0 <= key < length:
        raise HeadscopeError(f"key={key} is not a position in samples of {length} tokens: choose 0 to {length - 1}")
    if not 0.0 <= epsilon < 1.0:
        raise HeadscopeError(f"epsilon={epsilon} is no threshold for a share of attention: choose 0 <= epsilon < 1")


def _samples(lm: LanguageModel, inputs: str, texts: Text | None, length: int, samples: int, seed: int) -> list[Sample]:
    if inputs == "natural":
        given = _list(texts or [])
        return sequences.text_samples(lm, given, length, min(samples, max(1, len(given))))  # first windows only
    drawn = sequences.random_samples(lm, length if inputs == "random" else 1, samples, seed)
    if inputs == "random":
        return drawn
    check_length(lm, length)
    return [Sample({**one.trial, "input": "repeat"}, one.ids.repeat(length)) for one in drawn]


def _list(texts: Text) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
