"""Attention to an object: whether a head looks where the object is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Scored
from headscope.interp.heads.vision.attention import Rows, key_attention
from headscope.interp.heads.vision.chats import ChatMethod
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.grids import Box, ImageGrid
from headscope.interp.prompts.look import look
from headscope.interp.prompts.vision_data import BOXES, VisionData, VisionItem, vision_items
from headscope.interp.runs.journal import Trial
from headscope.interp.sites.given import Loadable

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ObjectRegion(ChatMethod):
    """Score heads by how well their attention parts an object's tokens from the rest of the picture (AUROC).

    The analysis of Chen et al. 2025, "Why Is Spatial Reasoning Hard for VLMs?" (arXiv 2503.01773): attention of the
    prompt's last row to image tokens against the object's box. AUROC: the chance that a token of the box has more
    attention than one outside, 0.5 for a head that does not know where the object is. A token is the box's where the
    box covers at least half of its cell (of a smaller box: the cells that it covers most) [OURS]. A trial is one object
    of one chat; ``mass`` (on the picture, mean of heads) and ``area`` (the box's share of the grid) stand in its
    details. One of which the model sees nothing (a crop), or nothing else, is not kept. Boxes come with the data; those
    that the question is about are for the data to say.

    What it does not show: that what is looked at is used; a large AUROC of a head with hardly any mass on the picture
    (see ``region_table``) says little.

    Args:
        rows: "last", or "behind" for the mean over all rows of text behind the picture.
    """

    name: ClassVar[str] = "object_region"
    unit: ClassVar[str] = "AUROC"
    range: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    source: ClassVar[str] = "arXiv 2503.01773"
    tests: ClassVar[str] = "heads/vision/test_methods.py"
    reproduced: ClassVar[str] = (
        "AUROC, mass and share against eager weights of tiny models of nine families; a hand-made map"
    )
    not_reproduced: ClassVar[str] = "the paper's AUROC by layer: 7B models and COCO"

    unkept: ClassVar[str] = (
        "the model sees nothing of the boxes, or nothing beside them (it may cut the picture; see ImageGrid.box)"
    )

    rows: Rows = "last"

    def trials(self, lm: LanguageModel) -> Sequence[Trial]:
        _without_boxes(vision_items(self.data, self.samples))
        looks = enumerate(self.looks(lm))
        return [{"sample": i, "name": one.item.name, "object": name} for i, one in looks for name in one.item.boxes]

    @property
    def resample_by(self) -> str | None:
        return "sample"  # objects of one picture are read in one pass

    def summary(self, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
        items = vision_items(self.data, self.samples)
        bare = _without_boxes(items)
        return {"note": f"{bare} of {len(items)} chats have no boxes and are left out"} if bare else {}

    def score(self, lm: LanguageModel, trial: Trial) -> Scored:
        one = self.looks(lm)[trial["sample"]]
        received = key_attention(lm, one, self.rows)
        inside, values = _tokens(one.grids_with(0), one.item.boxes[trial["object"]], received.to_numpy())
        if not _parts(inside):
            return None, {"area": float(inside.mean())}
        full = np.full((lm.info.layers, lm.info.heads), np.nan)
        full[received["layer"].to_numpy(), : values.shape[1]] = auroc(values, inside >= _half(inside))
        return full, {"area": float(inside.mean()), "mass": float(values.sum(-1).mean())}


def region_table(
    model: Loadable, data: VisionData = None, *, samples: int = 10, rows: Rows = "last", level: str = "layer"
) -> pd.DataFrame:
    """Attention to each object: a row an example, object and layer (``level="head"``: and head).

    Columns: ``auroc`` (see ``object_region``); ``mass`` on the box, cells counted by the share that it covers;
    ``image``: mass on the picture; ``share`` = mass / image; ``area``: the box's share of the grid; ``lift`` = share /
    area, 1 for attention spread evenly. By layer, attention is the mean over heads.

    Raises:
        HeadscopeError: no chat has boxes, or none of which the model sees a part.
    """
    lm, items = load_model(model), vision_items(data, samples)
    _without_boxes(items)
    tables = []
    for example, item in enumerate(items):
        one = look(lm, item)
        received = key_attention(lm, one, rows)
        layers = received["layer"].to_numpy()
        weights = received.to_numpy() if level == "head" else received.to_numpy().mean(1, keepdims=True)
        for name, box in item.boxes.items():
            inside, values = _tokens(one.grids_with(0), box, weights)
            if not _parts(inside):
                continue
            layer, head = (index.ravel() for index in np.indices(values.shape[:2]))
            mass, image = (values * inside).sum(-1), values.sum(-1)
            with np.errstate(invalid="ignore", divide="ignore"):
                share = mass / image
            columns: dict[str, Any] = {"example": example, "object": name, "layer": layers[layer], "head": head}
            numbers = {"auroc": auroc(values, inside >= _half(inside)), "mass": mass, "image": image, "share": share}
            area = float(inside.mean())
            columns |= {key: x.ravel() for key, x in numbers.items()} | {"area": area, "lift": share.ravel() / area}
            tables.append(pd.DataFrame(columns))
    if not tables:
        raise HeadscopeError("no chat names an object of which the model sees a part: it may cut the picture")
    found = pd.concat(tables, ignore_index=True)
    return found if level == "head" else found.drop(columns="head")


def _without_boxes(items: Sequence[VisionItem]) -> int:
    """How many chats have no boxes; refused where none has."""
    bare = sum(not one.boxes for one in items)
    if bare == len(items):
        raise HeadscopeError(f"the data have no boxes, so no object has a place: give each chat its {BOXES}")
    return bare


def auroc(values: Array, inside: NDArray[np.bool_]) -> Array:
    """The chance that a token of ``inside`` (token,) has a larger value (..., token) than another, ties by half."""
    n, rest = int(inside.sum()), int((~inside).sum())
    ranks = rankdata(values, axis=-1)
    return np.asarray((ranks[..., inside].sum(-1) - n * (n + 1) / 2) / (n * rest))


def _half(inside: Array) -> float:
    return min(0.5, float(inside.max()))


def _parts(inside: Array) -> bool:
    """Whether a box holds a token and leaves one."""
    return bool(inside.any() and (inside < _half(inside)).any())


def _tokens(grids: Sequence[ImageGrid], box: Box, values: Array) -> tuple[Array, Array]:
    """The share of each token of a picture's grids that ``box`` covers (token,), and their values (..., token)."""
    inside = np.concatenate([grid.covered(box).ravel() for grid in grids])
    flat = [grid.of(values).reshape(*values.shape[:-1], -1) for grid in grids]
    return inside, np.concatenate(flat, axis=-1).astype(np.float64)
