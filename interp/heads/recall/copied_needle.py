"""What retrieval scores are made of: the heaviest keys of the rows that emit an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.prompts.needle import NeedlePrompt
from headscope.interp.statistics.spans import Span

Count = Literal["counter", "set"]
LEAD = "Answer:"  # begins a chat model's turn where an answer is fed, as the base prompt ends


def copy_score(
    top: NDArray[np.int64], emitted: Sequence[int], ids: Sequence[int], span: Span, count: Count = "counter"
) -> NDArray[np.float64]:
    """Share of the needle that each head copies (..., head).

    Args:
        top: heaviest key of the row that emitted each token (..., head, step), as positions in the prompt.
        emitted: the emitted token ids (step,).
        ids: the prompt's token ids.
        span: the needle's (first, stop) in ``ids``.
        count: "counter": copies / tokens of the span; "set": distinct token ids copied / distinct ids of the span.
    """
    first, stop = span
    prompt, new = np.asarray(ids), np.asarray(emitted)
    inside = (top >= first) & (top < stop)
    copied = inside & (prompt[np.where(inside, top, first)] == new)
    if count == "counter":
        return np.asarray(copied.sum(axis=-1) / (stop - first), dtype=np.float64)
    distinct = np.unique(prompt[first:stop])
    found = [(copied & (new == token)).any(axis=-1) for token in distinct]
    return np.asarray(np.sum(found, axis=0) / len(distinct), dtype=np.float64)


def top_keys(record: xr.Dataset) -> NDArray[np.int64]:
    """Heaviest key of every traced row (layer, head, step)."""
    top = record["top_keys"].isel(example=0, rank=0).transpose("layer", "head", "query")
    return np.asarray(top.to_numpy(), dtype=np.int64)


def place_of(prompt: NeedlePrompt) -> dict[str, int]:
    """What a trial's details say of its prompt."""
    return {"tokens": len(prompt.ids), "position": prompt.span[0], "answer_tokens": prompt.span[1] - prompt.span[0]}
