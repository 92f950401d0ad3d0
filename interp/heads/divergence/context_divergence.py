"""Context divergence: how far a head's output moves when a part of the prompt is taken out (VHD, for any span)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored, by_head
from headscope.interp.heads.divergence.contexts import Context, ContextMethod, DocumentContext
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import HeadOutput, Statistic


@dataclass(frozen=True, kw_only=True)
class OutputDivergence(ContextMethod):
    """Base of the methods that score heads by the distance between their outputs z with a span and without it.

    Args:
        rows: the last so many positions are read, those of a response that ends the prompt, and averaged.
        zero_outliers: apply the rule of "negative vision sensitivity" to every row.
        k: of T-VHD.
    """

    unit: ClassVar[str] = "norm of z"
    source: ClassVar[str] = "arXiv 2412.13949"

    rows: int = 1
    zero_outliers: bool = False
    k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 1 or (self.k is not None and self.k < 1):
            raise HeadscopeError("rows and k are at least 1")

    def contexts(self, lm: LanguageModel) -> list[Context]:
        """Both prompts of every sample, whose last ``rows`` positions are the same."""
        found = super().contexts(lm)
        for whole, rest in found:
            last = max(stop for _, stop in whole.trial["removed"])
            if last > len(whole.ids) - self.rows or len(rest.ids) < self.rows:
                raise HeadscopeError(
                    f"the span {self.span!r} reaches into the last {self.rows} positions of prompt "
                    f"{whole.trial['sample']}, which are compared; read fewer rows"
                )
        return found

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [HeadOutput(tuple(range(-self.rows, 0)))]

    def reduce(self, lm: LanguageModel, samples: Sequence[Sample], *records: xr.Dataset) -> list[Scored]:
        both = [r["z"].transpose("example", "layer", "head", "position", "d_head").to_numpy() for r in records]
        found: list[Scored] = []
        for with_span, alone in zip(*both, strict=True):
            z0 = alone.astype(np.float64)
            moved = by_head(lm, records[0], np.linalg.norm(with_span - z0, axis=-1))  # (layer, head, row)
            size = by_head(lm, records[0], (z0**2).sum(-1))
            details = {} if self.k is None else {"t_vhd": token_divergence(moved, self.k).tolist()}
            kept = np.where(outliers(moved, size), 0.0, moved) if self.zero_outliers else moved
            found.append((kept.mean(-1), details))
        return found


@dataclass(frozen=True, kw_only=True)
class ContextDivergence(OutputDivergence, DocumentContext):
    """Score heads by the distance between their outputs with a span of the prompt and without it.

    Vision-aware head divergence of He et al. 2025, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head
    Divergence" (arXiv 2412.13949, Eq. 4 to 7), for any named span: the Euclidean norm of z with the span minus z
    without, z (d_head) at the last position before the output projection. On the image of a chat it is ``vhd``, which
    makes the prompts from pictures. No code of theirs is to be had; what the paper leaves open is said here.

    With ``zero_outliers`` their rule of "negative vision sensitivity" is applied, as before their choice of heads: in
    each layer a head's divergence is set to 0 where it exceeds the layer's mean + standard deviation and so does the
    squared norm of its z without the span; n - 1 in the deviation [OURS]. Their set of a layer's heads is then
    ``above_median``. With ``k`` a trial's ``t_vhd`` is T-VHD of every row read: the sum over layers of the ``k``
    largest divergences, before any zeroing [OURS]; no default of k is known.

    What it does not show: that the head uses what the span says: the span also moves every later position, and takes
    attention from the rest. z has another size in every layer and model: compare ranks, not values.
    """

    name: ClassVar[str] = "context_divergence"
    tests: ClassVar[str] = "heads/test_context_divergence.py"
    reproduced: ClassVar[str] = (
        "VHD against two untraced runs of a tiny model, of SmolLM2 and, with an image, of a tiny LLaVA; "
        "outliers and T-VHD by hand"
    )
    not_reproduced: ClassVar[str] = "the paper's vision-language models; no code of the authors is to be had"


def outliers(divergence: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where both exceed their layer's mean + standard deviation (n - 1) over heads: (layer, head, ...)."""
    high = [x > x.mean(1, keepdims=True) + x.std(1, ddof=1, keepdims=True) for x in (divergence, size)]
    return np.asarray(high[0] & high[1])


def above_median(divergence: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The heads of each layer that exceed its median (of an even number: the mean of the middle two): (layer, head)."""
    return np.asarray(divergence > np.median(divergence, axis=1, keepdims=True))


def token_divergence(divergence: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """T-VHD of every row: the sum over layers (those that attend) of the ``k`` largest of (layer, head, row)."""
    if k > divergence.shape[1]:
        raise HeadscopeError(f"k={k} of {divergence.shape[1]} heads a layer: choose fewer")
    return np.asarray(np.nansum(np.sort(divergence, axis=1)[:, -k:], axis=(0, 1)))
