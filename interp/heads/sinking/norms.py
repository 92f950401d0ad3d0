"""What norm methods share: how long one key's vector is, against the others of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from headscope.interp.heads.base import Scored, by_head
from headscope.interp.heads.texts import TextMethod
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample


@dataclass(frozen=True, kw_only=True)
class NormRatio(TextMethod):
    """The norm of the vector at ``key`` over the mean norm of the text's others: 1 where it is as long as they are.

    Args:
        key: the position of the sink.
    """

    unit: ClassVar[str] = "ratio of norms"
    source: ClassVar[str] = "arXiv 2410.10781"
    variable: ClassVar[str]

    key: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_key(self.key)

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        norms = records[0][self.variable].transpose("example", "layer", "head", "key").to_numpy().astype(np.float64)
        return [(by_head(lm, records[0], ratio(one, self.key)), {}) for one in norms]


def ratio(norms: np.ndarray[Any, np.dtype[np.float64]], key: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Norms (..., position): that at ``key`` over the mean of the others (...)."""
    here, others = norms[..., key], np.delete(norms, key, axis=-1)
    return np.asarray(here / others.mean(axis=-1))
