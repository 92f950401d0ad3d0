"""What the measures of a response share: which rows are its own, and the future attention of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.texts import TextMethod
from headscope.interp.statistics import KeyMass, Statistic, TargetMass

Values = NDArray[np.float64]
SHARE = 0.3  # of all heads are local, and as many global


@dataclass(frozen=True, kw_only=True)
class ResponseMethod(TextMethod):
    """A measure of Li et al. 2025 (arXiv 2510.13554) over the rows of a response: row t is that of token t itself.

    The paper samples responses of Qwen3-4B-Base to 70 problems of GSM8K at temperature 0.7. By default the rest of a
    text stands for the response to its beginning; give ``texts`` that the model has written, behind prompts of
    ``prompt`` tokens, for the paper's setting.

    Args:
        prompt: tokens before the response.
    """

    source: ClassVar[str] = "arXiv 2510.13554"

    length: int = 256
    prompt: int = 64
    samples: int = 20
    batch: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prompt < self.length:
            raise HeadscopeError(
                f"prompt={self.prompt}: leave tokens for a response, 0 <= prompt < length={self.length}"
            )


def groups(span: Values, share: float = SHARE) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which heads (layer, head) are local and which global: the ``share`` of smallest and of largest mean distance.

    floor(share * heads of the model) in each, at least one, ties in model order [OURS; the paper: "e.g. 30 %"]. Heads
    without a distance (NaN) are in neither.

    Raises:
        HeadscopeError: a share that is not between 0 and a half.
    """
    if not 0 < share <= 0.5:
        raise HeadscopeError(f"share={share}: a group of heads is more than none and at most half of them")
    flat = span.ravel()
    count = max(1, int(Fraction(str(share)) * int(np.isfinite(flat).sum())))
    found = []
    for order in (np.argsort(flat, kind="stable"), np.argsort(-flat, kind="stable")):  # NaN comes last in both
        chosen = np.zeros(flat.size, dtype=bool)
        chosen[order[:count]] = True
        found.append(chosen.reshape(span.shape))
    return found[0], found[1]


def future_statistics(lowest: int, highest: int | None) -> list[Statistic]:
    """What ``future_attention`` reads: no more than one number a key and one a query for each offset."""
    if lowest < 0 or (highest is not None and highest < lowest):
        raise HeadscopeError(f"a horizon from {lowest} to {highest} tokens ahead is none: 0 <= lowest <= highest")
    offsets = range(lowest) if highest is None else range(lowest, highest + 1)
    targets = [TargetMass({str(o): _back(o) for o in offsets})] if len(offsets) else []
    return [*([KeyMass()] if highest is None else []), *targets]


def future_attention(record: xr.Dataset, prompt: int, lowest: int, highest: int | None) -> Values:
    """FAI of each response token s and head (example, layer, head, token): the mean of A[t, s] over the rows t from
    s + ``lowest`` to s + ``highest`` (None: to the end) of the response; NaN for a token without such a row."""
    size = record.sizes["key" if "key_mass" in record else "query"]
    if "key_mass" in record:
        total = record["key_mass"].transpose("example", "layer", "head", "key").to_numpy().astype(np.float64)
        last, sign = size, -1.0
    else:
        total = np.zeros(tuple(record.sizes[name] for name in ("example", "layer", "head", "query")))
        last, sign = int(highest or 0), 1.0
    if "target_mass" in record:
        mass = record["target_mass"].transpose("target", "example", "layer", "head", "query").to_numpy()
        for label, one in zip(record["target"].to_numpy(), mass, strict=True):
            o = int(label)  # the query s + o gives what the key s receives from it
            total[..., : max(0, size - o)] += sign * one[..., o:]
    s = np.arange(size)
    rows = np.minimum(size - 1, s + last) - (s + lowest) + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(rows > 0, np.maximum(total, 0.0) / np.maximum(rows, 1), np.nan)
    return np.asarray(mean[..., prompt:])


def _back(offset: int) -> Callable[[Tensor], Tensor]:
    return lambda q: q - offset
