"""Attention from text to a picture's tokens: maps, their entropy, and their trend with the order of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.passes import record_of
from headscope.interp.heads.position.trend import recency_trend, remove_trend
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.grids import ImageGrid
from headscope.interp.prompts.look import Look, look, sample_of
from headscope.interp.prompts.vision_data import VisionData, vision_items
from headscope.interp.results.picture_values import PictureValues, place
from headscope.interp.sites.given import Loadable
from headscope.interp.statistics import KeyMass

Rows = Literal["behind", "last"]
Array = NDArray[np.float64]


def image_attention(
    model: Loadable, data: VisionData = None, *, samples: int = 10, rows: Rows = "behind"
) -> list[PictureValues]:
    """What every image token receives from text, (layer, head, row, column), in the order of chats and pictures.

    Args:
        model: load_model's result, or what it takes.
        data: chats with pictures (``headscope.interp.prompts.vision_data``).
        samples: chats at most.
        rows: "behind": the mean over all rows of text behind the last picture (PyramidDrop's score); "last": the
            prompt's last row, which chooses the first generated token (FastV's).

    Raises:
        HeadscopeError: as ``vision_prompt``; no text behind the picture; tokens that are no known grid.
    """
    lm = load_model(model)
    found = []
    for item in vision_items(data, samples):
        one = look(lm, item)
        received = key_attention(lm, one, rows)
        coordinates = {dim: received[dim].to_numpy() for dim in ("layer", "head")}
        title = "Attention from text" if rows == "behind" else "Attention of the last row"
        found += place(one, received.to_numpy(), ("layer", "head"), coordinates, title=title)
    return found


def key_attention(lm: LanguageModel, one: Look, rows: Rows = "behind") -> xr.DataArray:
    """What each token of a chat receives from its ``rows``, their mean: (layer, head, key)."""
    count = len(one.ids)
    if rows not in ("behind", "last"):
        raise HeadscopeError(f"rows={rows!r}: choose 'behind' or 'last'")
    first = one.end if rows == "behind" else count - 1
    if first >= count or one.end >= count:
        raise HeadscopeError(f"no text stands behind the picture of chat {one.item.name!r}, so nothing looks at it")
    with one.prompt.published():  # for edits that name its spans
        record = record_of(lm, [sample_of(lm, 0, one.prompt)], [KeyMass(queries=(first, count))])
    return record["key_mass"].isel(example=0).transpose("layer", "head", "key") / (count - first)


def image_entropy(maps: PictureValues) -> xr.DataArray:
    """Entropy of a map over the picture's tokens, in nats, with the map brought to sum 1 over them [OURS]: (...).

    H = -sum a log a of CARVE (Ge et al. 2025, arXiv 2509.06461), whose text does not say whether a is normalised; so it
    lies between 0 (one token) and log n, and does not fall because less of the picture is looked at. NaN where nothing
    of the picture is. What it does not show: whether the tokens looked at are the right ones.
    """
    a = maps.flat()
    with np.errstate(invalid="ignore", divide="ignore"):
        p = a / a.sum(-1, keepdims=True)
        h = -np.where(p > 0, p * np.log(p), 0.0).sum(-1)
    h = np.where(a.sum(-1) > 0, h, np.nan)
    return maps.values.isel(row=0, column=0, drop=True).copy(data=h).rename("entropy").assign_attrs(unit="nats")


def padding_mask(grid: ImageGrid, threshold: float = 0.5) -> NDArray[np.bool_]:
    """Which cells are picture: the share of padding is at most ``threshold``, (row, column).

    The padding sinks of Zhao et al. 2025 (arXiv 2508.17807; ``generate_pad_mask`` of intcomp/attention-bias @ e75ebe7,
    FastV's 0.5, PyramidDrop's 0.01), by area: exact for any processor, and theirs for pictures padded to a square.
    """
    return np.asarray(1.0 - grid.real <= threshold + 1e-12)  # half of a cell is half of it, however it was rounded


def debiased(
    maps: Sequence[PictureValues], *, threshold: float | None = 0.5
) -> tuple[list[PictureValues], pd.DataFrame]:
    """Text-to-image attention without its recency trend and padding, per layer, and what the trend was.

    Zhao et al. 2025, "Attention Debiasing for Token Pruning in VLMs" (arXiv 2508.17807): keys later in raster order
    receive more from later text, as mu exp(sigma x), x = i / (n - 1). The mean over heads and over all maps of one grid
    is fitted by least squares on the values (``recency_trend`` [OURS]: the authors' script is not published), and every
    map is multiplied by exp(-sigma x), then by the mask (``padding_mask``; None: not). Maps of several grids have a fit
    each. No order is imposed on what follows: theirs is mask, then the number of tokens, then the weights, then top-k.

    Returns:
        The debiased maps (layer, row, column), means over heads; and a table: grid, view, images, layer, sigma (above
        0: later tokens receive more), r2, after (sigma of the debiased mean), padding (the share of cells that are
        masked), on_padding (their share of the mass, before: above ``padding``, they are sinks).

    What it does not show: that a token with little left is unimportant; or that the trend is a bias and not the place
    of what matters: over few pictures both look alike, so fit many.

    Raises:
        HeadscopeError: no maps, or maps without layers.
    """
    if not maps or any("layer" not in one.values.dims for one in maps):
        raise HeadscopeError("give maps of layers, as image_attention makes them")
    means = [one.mean("head") if "head" in one.values.dims else one for one in maps]
    found: list[PictureValues | None] = [None] * len(maps)
    table = []
    for shape, view in dict.fromkeys((one.grid.shape, one.grid.view) for one in means):
        members = [i for i, one in enumerate(means) if (one.grid.shape, one.grid.view) == (shape, view)]
        mean = np.mean([means[i].flat() for i in members], axis=0)  # (layer, token)
        trend = recency_trend(mean)
        after = recency_trend(remove_trend(mean, trend))
        masks = [np.ones(shape) if threshold is None else padding_mask(means[i].grid, threshold) for i in members]
        for i, mask in zip(members, masks, strict=True):
            laid = remove_trend(means[i].flat(), trend).reshape(-1, *shape) * mask
            found[i] = _with(means[i], laid)
        facts = {"grid": f"{shape[0]} x {shape[1]}", "view": view, "images": len(members)}
        padding = float(1 - np.mean(masks))
        hidden = np.mean([means[i].flat() * (1 - mask.ravel()) for i, mask in zip(members, masks, strict=True)], axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            on_padding = hidden.sum(-1) / mean.sum(-1)
        for at, layer in enumerate(means[members[0]].values["layer"].to_numpy().tolist()):
            own = {"sigma": trend.sigma, "r2": trend.r2, "after": after.sigma, "on_padding": on_padding}
            table.append({**facts, "layer": layer, "padding": padding, **{k: float(v[at]) for k, v in own.items()}})
    return [one for one in found if one is not None], pd.DataFrame(table)


def _with(maps: PictureValues, values: Array) -> PictureValues:
    title = f"{maps.title}, trend and padding taken away"
    return PictureValues(
        maps.values.copy(data=values), maps.grid, maps.picture, "mass", title, maps.marked, maps.boxes, maps.name
    )
