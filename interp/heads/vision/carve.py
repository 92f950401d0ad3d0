"""Contrastive attention: where a question makes the model look, over where it looks for any description (CARVE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.vision.generating import generated_maps
from headscope.interp.models import load_model
from headscope.interp.prompts.grids import ImageGrid
from headscope.interp.prompts.look import look
from headscope.interp.prompts.vision_data import VisionItem
from headscope.interp.results.picture_values import PictureValues
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.sizes import tower_size

Array = NDArray[np.float64]
Version = Literal["v1", "v2", "v3", "v4"]
GENERAL = "Write a general description of the image."
SUFFIX = " Answer the question using a single word or phrase."
LAYERS, DEPTH = range(20, 26), 32  # the authors', of LLaVA-1.5-7B's
FLOOR = 1e-8
SQUARES = {256: 16, 576: 24, 1024: 32, 1600: 40, 1681: 41}  # the authors' table of grids by number of tokens


@dataclass(frozen=True, eq=False)
class Carved:
    """``map`` (height, width) in pixels of the picture, the ``mask`` of what is kept of it, and the ``box`` around that
    (left, top, right, bottom); ``contrast``: the same on the grid, summed over steps, by layer; ``answers``: tokens
    generated for the question and for the description."""

    map: Array
    mask: NDArray[np.bool_]
    box: tuple[int, int, int, int]
    contrast: PictureValues
    answers: tuple[int, int]

    def refined(self) -> NDArray[np.uint8]:
        """The picture with all else black, cut to the box and enlarged until no side is below the picture's."""
        from PIL import Image

        left, top, right, bottom = self.box
        held = (self.contrast.picture * self.mask[..., None])[top:bottom, left:right]
        height, width = self.mask.shape
        scale = max(width / (right - left), height / (bottom - top))
        size = max(1, int((right - left) * scale)), max(1, int((bottom - top) * scale))
        return np.asarray(Image.fromarray(held).resize(size, Image.Resampling.LANCZOS))


def carve(
    model: Loadable,
    item: VisionItem,
    *,
    version: Version = "v4",
    share: float = 0.2,
    layers: Sequence[int] | None = None,
    general: str = GENERAL,
    suffix: str = SUFFIX,
    max_new_tokens: int = 32,
    authors_grid: bool = False,
) -> Carved:
    """Where the first picture of a chat matters for its question, by contrast with a general description.

    Ge et al. 2025, "Focusing by Contrastive Attention" (arXiv 2509.06461; carve/attention.py and masking.py of
    YuyaoGe/CARVE @ a1f0442): both texts are answered greedily; with A the mean over heads of the row that chooses token
    t, S = sum over t of (t + 1) sum over layers of A_question / (A_general + 1e-8), enlarged to the picture bilinearly.
    Kept are pixels above the (1 - ``share``) percentile, in 4-connected components, ranked by their sum of S, of which
    max(3, int(n share)) stay. Versions: v4, as said; v3, of t = 0 alone; v2, t = 0, ranked by size; v1, t = 0, all
    components of at least 0.1 % of the kept pixels.

    What differs: the grid is the processor's, and lies where the processor looked (a crop, padding); the authors read
    256, 576, 1024, 1600 and 1681 tokens as squares over the whole picture whatever the processor says
    (``authors_grid=True``). Layers are their 20 to 25, as shares of 32 [OURS]. Of a picture with tiles the tiles count.

    What it does not show: that the model needs the region. The ratio is ruled by tokens that the description hardly
    looks at; in half precision those underflow.

    Args:
        item: a chat with one text of the user, the question.
        share: p of the paper.
        layers: None: the authors', by depth.
        general, suffix: the description's prompt, and what ends both.

    Raises:
        HeadscopeError: as ``look``; a version or share that is none.
    """
    if version not in ("v1", "v2", "v3", "v4") or not 0 < share <= 1:
        raise HeadscopeError(f"version={version!r} and share={share}: choose v1 to v4, and 0 < share <= 1")
    lm = load_model(model)
    depth = tower_size(lm).depth
    chosen = sorted({layer * depth // DEPTH for layer in LAYERS} if layers is None else set(layers))
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens if version == "v4" else 1, "layers": chosen}
    both = [generated_maps(lm, look(lm, _with_text(item, text, suffix)), **options) for text in (None, general)]
    asked, told = ([one for one in maps if one.grid.image == 0][-1] for maps in both)
    steps = min(asked.values.sizes["step"], told.values.sizes["step"])
    a, b = (one.values.mean("head").transpose("step", "layer", "row", "column").to_numpy() for one in (asked, told))
    weights = np.arange(1, steps + 1)[:, None, None, None]
    contrast = (weights * a[:steps] / (b[:steps] + FLOOR)).sum(0)
    grid = _as_authors(asked.grid) if authors_grid else asked.grid
    laid = asked.values.isel(step=0, head=0, drop=True).transpose("layer", "row", "column")
    found = PictureValues(
        laid.copy(data=contrast), asked.grid, asked.picture, "ratio", "Contrast", boxes=item.boxes, name=item.name
    )
    height, width = asked.picture.shape[:2]
    whole = enlarged(contrast.sum(0).reshape(grid.shape), grid, (height, width))
    mask = kept_pixels(whole, version, share)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Carved(whole, mask, box, found, (len(a), len(b)))


def enlarged(values: Array, grid: ImageGrid, size: tuple[int, int]) -> Array:
    """Values (row, column) at every pixel of a picture (height, width), bilinearly, 0 where the grid does not reach.

    As PIL's BILINEAR on floats, which for enlarging is interpolation between the cells' middles; where the picture has
    fewer pixels than the grid cells, it averages over what a pixel covers.
    """
    left, top, right, bottom = (round(x) for x in grid.box)
    wide, high = max(1, right - left), max(1, bottom - top)
    laid = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))[None, None]
    shrinks = high < values.shape[0] or wide < values.shape[1]
    big = functional.interpolate(laid, (high, wide), mode="bilinear", align_corners=False, antialias=shrinks)[0, 0]
    found = np.zeros(size)
    y, x = slice(max(0, top), min(size[0], bottom)), slice(max(0, left), min(size[1], right))
    found[y, x] = big.numpy()[y.start - top : y.stop - top, x.start - left : x.stop - left]
    return found


def kept_pixels(values: Array, version: Version, share: float) -> NDArray[np.bool_]:
    """The pixels of a map (height, width) that a version keeps."""
    above = values >= np.percentile(values, (1 - share) * 100)
    labels, count = ndimage.label(above)
    index = np.arange(1, count + 1)
    sizes = ndimage.sum_labels(above, labels, index)
    if version == "v1":
        return np.asarray(np.isin(labels, index[sizes >= 0.001 * above.sum()]))
    weight = sizes if version == "v2" else ndimage.sum_labels(values, labels, index)
    best = np.argsort(-weight, kind="stable")[: max(3, int(count * share))]
    return np.asarray(np.isin(labels, index[best]))


def _as_authors(grid: ImageGrid) -> ImageGrid:
    side = SQUARES.get(grid.positions.size)
    positions = grid.positions if side is None else grid.positions.reshape(side, side)
    whole = (0.0, 0.0, float(grid.size[0]), float(grid.size[1]))
    return ImageGrid(positions, whole, grid.size, grid.image, grid.view)


def _with_text(item: VisionItem, text: str | None, suffix: str) -> VisionItem:
    """The chat with another text in place of the user's (None: the same), and ``suffix`` behind it."""
    texts = 0
    chat: list[Any] = []
    for message in item.chat:
        content = message["content"]
        if message["role"] == "user" and not isinstance(content, str):
            content = [dict(part) for part in content]
            for part in (part for part in content if part.get("type") == "text"):
                part["text"] = (part["text"] if text is None else text) + suffix
                texts += 1
        chat.append({**message, "content": content})
    if texts != 1:
        raise HeadscopeError(f"CARVE asks one question about a picture; this chat has {texts} texts of the user")
    return VisionItem(chat, item.boxes, item.name)
