"""Methods that read the beginnings of texts: those of one length share their forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Measured, Text, by_head
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import LogSumExp, Resid, Statistic


@dataclass(frozen=True, kw_only=True)
class TextMethod(Measured):
    """A method that reads the first ``length`` tokens of each text.

    Args:
        texts: what is read (by default passages of the bundled prose), each with the tokenizer's default special
            tokens.
        length: tokens of each text; a shorter text is refused.
        samples: texts at most; each is a trial, and the intervals resample them.
    """

    texts: Text | None = None
    length: int = 64
    samples: int = 100
    batch: int = 20

    def prepare(self, lm: LanguageModel) -> list[Sample]:
        return sequences.first_windows(lm, self.texts, self.length, self.samples)

    def check_key(self, key: int) -> None:
        """Refuse a position that the samples do not have."""
        if not 0 <= key < self.length:
            raise HeadscopeError(
                f"key={key} is not a position in samples of {self.length} tokens: choose 0 to {self.length - 1}"
            )


@dataclass(frozen=True, kw_only=True)
class StreamMethod(TextMethod):
    """A method that scores layers by their residual stream: every head of a layer is given its layer's value.

    Its results say so (``provenance["per"]`` is "layer"); compare layers by it, never the heads of one. Layers without
    softmax attention have no score, as with every head method.

    Args:
        place: "resid_pre", the stream that enters a layer and that its heads read, or "resid_post", what leaves it.
    """

    per: ClassVar[Literal["head", "layer"]] = "layer"

    place: Literal["resid_pre", "resid_post"] = "resid_pre"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.place not in ("resid_pre", "resid_post"):
            raise HeadscopeError(f"place={self.place!r}: choose 'resid_pre' or 'resid_post'")

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        positions = tuple(range(len(samples[0].ids)))
        return [LogSumExp(), Resid(self.place, positions)]  # beside attention only layers with heads are recorded

    def stream(self, record: xr.Dataset) -> NDArray[np.float64]:
        """The stream (example, layer, position, d_model)."""
        x = record[self.place].transpose("example", "layer", "position", "d_model")
        return np.asarray(x.to_numpy(), dtype=np.float64)

    def of_layers(self, lm: LanguageModel, record: xr.Dataset, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """A layer's value (layer,) as that of each of its heads (layer, head)."""
        return by_head(lm, record, np.repeat(values[:, None], lm.info.heads, axis=1))
