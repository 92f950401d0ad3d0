"""Receiver heads: they look back at a few sentences that all later ones share (Thought Anchors)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Measured, Scored, Text, by_head
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.prompts.haystack import sentence_ends
from headscope.interp.prompts.sequences import Sample
from headscope.interp.prompts.spans import encode
from headscope.interp.prompts.tokens import check_length
from headscope.interp.statistics import SpanMass, Statistic


@dataclass(frozen=True, kw_only=True)
class Receiver(Measured):
    """Score heads by the kurtosis of the attention that sentences receive from later ones: high where few get it all.

    Bogdan et al. 2025, "Thought Anchors: Which LLM Reasoning Steps Matter?" (arXiv 2506.19143; whitebox-analyses/
    attention_analysis/attn_funcs.py, receiver_head_funcs.py). M[i, j] is the mean of A over the rows of sentence i and
    the keys of sentence j. The vertical score of j is the mean of M[i, j] over the sentences i >= j + ``proximity``,
    nothing for the last ``proximity`` ones. A head's score is Fisher's kurtosis (biased, 0 for a normal distribution)
    of the vertical scores over the sentences of a text, averaged over texts; the paper takes the top 20 heads, and as
    anchors the sentences that these receive most: a trial's ``anchors`` are the ``anchors`` sentences of the highest
    vertical score, averaged over its ``heads`` heads of the highest kurtosis [OURS: one text's heads, not all texts'].

    What differs: their code ends the last sentence a token early; here it is whole. They read chains of thought, each
    response a text; pass yours as ``texts``. Sentences are told by full stops (``sentence_ends``).

    What it does not show: that a sentence matters for what follows (the paper's counterfactuals do), or that the head
    does; a head that rests on the first sentence has a high kurtosis too: compare ``sinks``.

    Args:
        texts: each is read to its first ``length`` tokens (by default passages of the bundled prose).
        length: tokens of a text, at most; a sentence that is cut there is left out.
        proximity: how many sentences back the first counted one is.
        control_depth: replace every row of M by the ranks of its counted entries, divided by their number, so that
            late sentences, whose attention is spread over more, weigh alike; the authors' head search leaves it off.
        heads: how many name a text's anchors.
        anchors: how many of those are kept in the details.
    """

    name: ClassVar[str] = "receiver"
    unit: ClassVar[str] = "kurtosis"
    source: ClassVar[str] = "arXiv 2506.19143"
    tests: ClassVar[str] = "heads/test_documents_and_sentences.py"
    reproduced: ClassVar[str] = (
        "vertical scores and kurtosis against eager weights of a tiny model and of SmolLM2, with and without "
        "depth control; by hand"
    )
    not_reproduced: ClassVar[str] = "chains of thought of R1-Distill models"

    texts: Text | None = None
    length: int = 1024
    proximity: int = 4
    control_depth: bool = False
    heads: int = 20
    anchors: int = 3
    samples: int = 10
    batch: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proximity < 1 or self.heads < 1 or self.anchors < 0:
            raise HeadscopeError("proximity and heads are at least 1, anchors at least 0")

    def prepare(self, lm: LanguageModel) -> list[Sample]:
        given = sequences.bundled_passages(lm, self.length, self.samples) if self.texts is None else self.texts
        texts = [given] if isinstance(given, str) else list(given)[: self.samples]
        if not texts:
            raise HeadscopeError("no text was given: pass a string or a list of strings")
        return [self._sample(lm, i, text) for i, text in enumerate(texts)]

    def _sample(self, lm: LanguageModel, index: int, text: str) -> Sample:
        ids, offsets = encode(lm.tokenizer, text)
        if offsets is None:
            raise HeadscopeError(f"{lm.name} has no fast tokenizer, so nobody knows which tokens a sentence became")
        ids, offsets = ids[: self.length], offsets[: self.length]
        check_length(lm, len(ids))
        spans = sentences(text, offsets)
        if len(spans) < self.proximity + 3:
            raise HeadscopeError(
                f"text {index} has {len(spans)} whole sentences in {len(ids)} tokens: the kurtosis over those that "
                f"others look back on needs {self.proximity + 3}; give longer texts, or more tokens of them"
            )
        return Sample({"sample": index, "sentences": [list(span) for span in spans]}, torch.tensor(ids))

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        most = max(len(sample.trial["sentences"]) for sample in samples)
        each = [[tuple(span) for span in sample.trial["sentences"]] for sample in samples]
        return [SpanMass({f"{j}": [spans[j : j + 1] for spans in each] for j in range(most)})]

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        mass = records[0]["span_mass"].transpose("example", "layer", "head", "query", "span").to_numpy()
        found: list[Scored] = []
        for one, sample in zip(mass, samples, strict=True):
            spans = sample.trial["sentences"]
            keys = np.array([stop - first for first, stop in spans])
            rows = [one[..., first:stop, : len(spans)].mean(axis=-2, dtype=np.float64) for first, stop in spans]
            between = by_head(lm, records[0], np.stack(rows, axis=-2) / keys)  # (layer, head, sentence, sentence)
            vertical = vertical_scores(between, self.proximity, self.control_depth)
            scores = stats.kurtosis(vertical[..., : -self.proximity], axis=-1)
            found.append((scores, {"sentences": len(spans), "anchors": self._anchors(scores, vertical)}))
        return found

    def _anchors(self, scores: NDArray[np.float64], vertical: NDArray[np.float64]) -> list[int]:
        """The sentences that the text's receiver heads look back on most."""
        order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=None, kind="stable")[: self.heads]
        received = vertical.reshape(-1, vertical.shape[-1])[order, : -self.proximity].mean(axis=0)
        return [int(j) for j in np.argsort(-received, kind="stable")[: self.anchors]]


def sentences(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The tokens of every whole sentence: a token belongs to the sentence that its first character stands in."""
    last = max((stop for _, stop in offsets), default=0)
    found, first = [], 0
    real = [i for i, (a, b) in enumerate(offsets) if a < b]  # without BOS and the like
    for end in sentence_ends(text):
        inside = [i for i in real if first <= offsets[i][0] < end]
        if inside and end <= last:
            found.append((inside[0], inside[-1] + 1))
        first = end
    return found


def vertical_scores(between: NDArray[np.float64], proximity: int, control_depth: bool = False) -> NDArray[np.float64]:
    """Mean over i >= j + proximity of M (..., i, j); NaN for the last ``proximity`` sentences."""
    n = between.shape[-1]
    counted = np.tril(np.ones((n, n), dtype=bool), -proximity)
    held = np.where(counted, between, np.nan)
    if control_depth:
        held = stats.rankdata(held, axis=-1, nan_policy="omit") / np.maximum(counted.sum(-1), 1)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing looks back on the last sentences
        scores: NDArray[np.float64] = np.nanmean(held, axis=-2)
    return scores
