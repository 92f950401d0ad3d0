"""Attention sinks: heads whose queries all look at one position, whatever it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Measured, Scored, Text, by_head
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import KeyMass, Statistic

Inputs = Literal["natural", "random", "repeat"]


@dataclass(frozen=True, kw_only=True)
class Sinks(Measured):
    """Score heads by alpha of one key: the attention it receives, averaged over the queries that see it, in [0, 1].

    Gu et al. 2024, "When Attention Sink Emerges in Language Models" (arXiv 2410.10781), section 3: for a sample of T
    tokens alpha_k = 1/(T - k) sum_{i >= k} A[i, k] (0-based), and Sink_k^eps is the percentage of
    (sample, layer, head) with alpha_k > eps, strictly. The paper's T = 64, eps = 0.3, k = first token
    and 100 samples are the defaults.

    Under a sliding window the sum is divided by the rows whose window holds k. That is ours: the authors divide by
    T - k there too, which gives less as soon as T exceeds the window (the default T = 64 is below most).

    Sink_k^eps of the model is in ``provenance["sink_rate_percent"]``, one number for each k = 0..T-1, and of each
    sample in its details. The last keys are seen by few queries, so their alpha is noisy (a single weight at T-1).

    What it does not show: that the position's content is ignored, or that the head does nothing when it rests there.

    Args:
        inputs: ``"natural"``: the first ``length`` tokens of each text, with the tokenizer's default special tokens (a
            model whose tokenizer adds BOS has it at k = 0). ``"random"``: different tokens drawn uniformly from the
            vocabulary without special and added ones; ``"repeat"``: one such token ``length`` times; both without BOS.
        texts: natural texts (by default passages of the bundled prose).
        length: T, tokens a sample; a shorter text is refused.
        key: k, the position whose alpha scores a head.
        epsilon: the threshold of Sink_k^eps.
    """

    name: ClassVar[str] = "sinks"
    unit: ClassVar[str] = "mass"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    source: ClassVar[str] = "arXiv 2410.10781"
    tests: ClassVar[str] = "heads/test_heads.py"
    reproduced: ClassVar[str] = (
        "alpha and Sink_k against eager weights and in closed form for uniform attention; SmolLM2: Sink_1 "
        "above 50 %, below 20 % at any of the next keys, 0 on repeated tokens, as the paper finds"
    )
    not_reproduced: ClassVar[str] = "the paper's models and training runs: they need a hub and a cluster"

    inputs: Inputs = "natural"
    texts: Text | None = None
    length: int = 64
    key: int = 0
    epsilon: float = 0.3
    samples: int = 100
    batch: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        inputs, length, key = self.inputs, self.length, self.key
        if inputs not in ("natural", "random", "repeat"):
            raise HeadscopeError(f"inputs={inputs!r}: choose 'natural', 'random' or 'repeat'")
        if inputs != "natural" and self.texts is not None:
            raise HeadscopeError(
                f"texts are read with inputs='natural', not with inputs={inputs!r}: leave one of them out"
            )
        if not 0 <= key < length:
            raise HeadscopeError(f"key={key} is not a position in samples of {length} tokens: choose 0 to {length - 1}")
        if not 0.0 <= self.epsilon < 1.0:
            raise HeadscopeError(
                f"epsilon={self.epsilon} is no threshold for a share of attention: choose 0 <= epsilon < 1"
            )

    def prepare(self, lm: LanguageModel) -> list[Sample]:
        if self.inputs == "natural":
            return sequences.first_windows(lm, self.texts, self.length, self.samples)
        if self.inputs == "random":
            return sequences.random_samples(lm, self.length, self.samples, self.seed)
        return sequences.one_token_samples(lm, self.length, self.samples, self.seed)

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [KeyMass("mean")]

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        alphas = records[0]["key_mass_mean"].transpose("example", "layer", "head", "key").to_numpy()
        rates = [{"sink_rate_percent": _rate(alpha, self.epsilon)} for alpha in alphas]
        return [
            (by_head(lm, records[0], alpha)[..., self.key], rate) for alpha, rate in zip(alphas, rates, strict=True)
        ]

    def summary(self, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"sink_rate_percent": np.mean([one["sink_rate_percent"] for one in details], axis=0).tolist()}


def _rate(alpha: NDArray[Any], epsilon: float) -> list[float]:
    """Sink_k^eps of one sample's alpha (layer, head, key), in percent, for every key."""
    return [float(rate) for rate in 100.0 * (alpha > epsilon).mean(axis=(0, 1))]
