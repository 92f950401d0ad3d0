"""What every head does with a text, in a dozen numbers from one pass: the features that heads are sorted by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Text
from headscope.interp.heads.passes import record_of
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.prompts.sequences import (
    Sample,
    after_previous_occurrence,
    position_before,
    previous_occurrence,
)
from headscope.interp.statistics import (
    Distance,
    Entropy,
    SinkMass,
    Statistic,
    TargetMass,
    TopKeys,
    WindowMass,
)

BATCH = 8  # texts in one forward pass
NEAR, LOCAL = 8, 32  # tokens of the windows
# what a head with much of it, and one with little, is called
FEATURES: dict[str, tuple[str, str]] = {
    "entropy": ("broad", "sharp"),
    "max_weight": ("one key at a time", "no single key"),
    "distance": ("far", "near"),
    "first_token": ("first token", "not the first token"),
    "sink_mass": ("first four tokens", "not the first four tokens"),
    "self": ("own token", "not the own token"),
    "previous": ("previous token", "not the previous token"),
    "duplicate": ("earlier occurrences", "no earlier occurrences"),
    "induction": ("after earlier occurrences", "not after earlier occurrences"),
    "near_mass": (f"last {NEAR} tokens", f"beyond {NEAR} tokens"),
    "local_mass": (f"last {LOCAL} tokens", f"beyond {LOCAL} tokens"),
}
_TARGETS = {
    "self": lambda ids: torch.arange(len(ids)),
    "previous": position_before,
    "duplicate": previous_occurrence,
    "induction": after_previous_occurrence,
}


def head_features(
    lm: LanguageModel, texts: Text | None = None, *, length: int = 128, samples: int = 16
) -> xr.DataArray:
    """What every head does with each text: (example, layer, head, feature), the names of ``FEATURES``. [OURS]

    Means over a text's rows but the first, which sees one key only: ``entropy`` (nats), ``max_weight`` (the heaviest
    key's mass), ``distance`` (tokens), the masses on the first token, on the first four, on the query itself, on the
    token before it, on the last occurrence of its token, on what followed that, and on the last 8 and 32 tokens, the
    query's own included. Earlier occurrences are averaged over the rows that have one: NaN in a text without. The texts
    run in batches of one trace each; no map is made. Only layers that attend are there.

    What they do not show: what a head writes, and what it does with other texts.

    Args:
        texts: several, of which the beginnings are read, or one, which is read in consecutive windows; by default
            passages of the bundled prose. Each is behind the tokenizer's own special tokens.
        length: tokens of each.
        samples: at most so many.

    Raises:
        HeadscopeError: no or too short a text, a length beyond the model's context, or attention that is not a number.
    """
    if length < 3:
        raise HeadscopeError(f"length={length}: a text of fewer than 3 tokens says nothing of a head; take more")
    if isinstance(texts, str):
        found = sequences.text_samples(lm, texts, length, samples)
    else:
        found = sequences.first_windows(lm, texts, length, samples)
    parts, layers = [], np.array([])
    for first in range(0, len(found), BATCH):
        group = found[first : first + BATCH]
        record = record_of(lm, group, _statistics(group))
        layers = record["layer"].to_numpy()
        parts.append(_reduced(record, group))
    whole = np.concatenate(parts)
    if not np.isfinite(whole[..., 0]).all():
        raise HeadscopeError(f"{lm.name} gives attention that is not a number: load it with dtype='float32'")
    coordinates = {"example": np.arange(len(whole)), "layer": layers, "feature": list(FEATURES)}
    return xr.DataArray(whole, coordinates, ("example", "layer", "head", "feature"), name="features")


def _statistics(samples: Sequence[Sample]) -> list[Statistic]:
    tables = {name: torch.stack([target(one.ids) for one in samples]) for name, target in _TARGETS.items()}
    return [
        Entropy(),
        TopKeys(1),
        Distance(),
        SinkMass(1, label="first"),
        SinkMass(4),
        TargetMass(tables),
        WindowMass(NEAR, label="near"),
        WindowMass(LOCAL, label="local"),
    ]


def _reduced(record: xr.Dataset, samples: Sequence[Sample]) -> NDArray[np.float64]:
    """Means over rows (example, layer, head, feature)."""
    rows = {
        "entropy": record["entropy"],
        "max_weight": record["top_mass"].isel(rank=0),
        "distance": record["distance"],
        "first_token": record["first.sink_mass"],
        "sink_mass": record["sink_mass"],
        **{name: record["target_mass"].sel(target=name) for name in _TARGETS},
        "near_mass": record["near.window_mass"],
        "local_mass": record["local.window_mass"],
    }
    counted = {name: np.stack([_has(target(one.ids)) for one in samples]) for name, target in _TARGETS.items()}
    every = np.arange(len(samples[0].ids)) > 0
    columns = []
    for name in FEATURES:
        values = rows[name].transpose("example", "layer", "head", "query").to_numpy().astype(np.float64)
        count = counted.get(name, np.ones((len(samples), 1), dtype=bool)) & every  # (example, query)
        shown = np.where(count[:, None, None], values, 0).sum(-1)
        with np.errstate(invalid="ignore"):  # 0 / 0: NaN where no row counts
            columns.append(shown / count.sum(-1)[:, None, None])
    return np.stack(columns, axis=-1)


def _has(keys: Tensor) -> NDArray[np.bool_]:
    return np.asarray((keys >= 0).numpy())
