"""Small random images in the forms that models take: whole, in tiles, as rows of patches, with what goes beside them.

No signature tells shapes, so forms are offered in turn, the most common first, each with whatever else the model's
forward names. Sizes are those of a model shrunk by ``headscope.interp.survey.shrink`` or any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from headscope.interp.sites.given import PreTrained

GRIDS = ("image_grid_thw", "grid_thw", "image_grid_hw", "image_grid_hws")
SIDE = 4  # patches in the height of an image given as patches


def pictures(
    model: PreTrained, names: Any, text: dict[str, Tensor], generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """One image an example, in every form, with the arguments among ``names`` that say more about it."""
    if "pixel_values" not in names and "flattened_patches" not in names:
        return
    vision = vision_config(model.config)
    alone = []
    for form in _forms(vision, names, generator):
        beside = _beside(model.config, vision, names, text, form, generator)
        yield {**form, **beside}
        alone += [form] if beside else []
    yield from alone  # some arguments are of another variant's images


def vision_config(config: Any) -> Any:
    """The configuration that holds an image's sizes."""
    for name in ("vision_config", "vision_model_config", "image_config", "vq_config"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    encoder = getattr(config, "encoder", None)  # of a model put together from two, whose first one sees
    return config if getattr(encoder, "image_size", None) is None else encoder


def _size(vision: Any) -> tuple[int, int]:
    size = getattr(vision, "image_size", None) or getattr(vision, "crop_size", None) or 32
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _channels(vision: Any) -> int:
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    return channels if isinstance(channels, int) else 3


def _forms(vision: Any, names: Any, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    channels, (high, wide) = _channels(vision), _size(vision)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    patch = getattr(vision, "patch_size", None) or 8
    patch = int(patch if isinstance(patch, int) else patch[0])
    if "flattened_patches" in names:  # each begins with its row and column, counted from 1
        at = (_grid() + 1.0).repeat(2, 1, 1)
        yield {"flattened_patches": torch.cat([at, noise(2, SIDE**2, channels * patch**2)], -1)}
        return
    grid = next((name for name in GRIDS if name in names), None)
    for second in (2 * SIDE, SIDE) if grid is not None else ():  # images of two sizes, or alike
        shape = torch.tensor([[1, SIDE, SIDE], [1, SIDE, second]])
        rows = int(shape.prod(-1).sum())
        beside = {str(grid): shape if str(grid).endswith("thw") else shape[:, 1:]}
        times = {int(getattr(vision, "temporal_patch_size", 1) or 1), 1, 2}
        for time in sorted(times, key=lambda n: n != getattr(vision, "temporal_patch_size", 1)):
            yield {"pixel_values": noise(rows, channels * time * patch * patch), **beside}
        yield {"pixel_values": noise(rows, channels, patch, patch), **beside}
        yield {"pixel_values": noise(1, rows, channels, patch, patch), **beside}
    yield {"pixel_values": noise(2, channels, high, wide)}
    for tiles in (1, 2, 3):
        yield {"pixel_values": noise(2, tiles, channels, high, wide)}
    yield {"pixel_values": noise(2, 1, int(getattr(vision, "max_num_tiles", 2)), channels, high, wide)}
    yield {"pixel_values": noise(2, SIDE**2, channels * patch * patch)}
    yield {"pixel_values": noise(2, 3, 32, 32)}


def _beside(
    config: Any, vision: Any, names: Any, text: dict[str, Tensor], form: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """What the forward names beside the image itself."""
    pixels = next(iter(form.values()))
    high, wide = _size(vision)
    length = text["input_ids"].shape[1] if "input_ids" in text else 0
    tiles = pixels.shape[2] if pixels.dim() == 6 else 1
    sharp = _size(getattr(config, "high_res_vision_config", vision))
    makers: dict[str, Callable[[], Tensor]] = {
        "image_sizes": lambda: torch.tensor([[high, wide]] * 2),
        "image_merge_sizes": lambda: torch.tensor([int(getattr(vision, "spatial_merge_size", 1))] * 2),
        "high_res_pixel_values": lambda: torch.randn(2, _channels(vision), *sharp, generator=generator),
        "image_attention_mask": lambda: torch.ones(2, length, 1, dtype=torch.long),
        "image_embeds_position_mask": lambda: _first(length, int(getattr(config, "latent_query_num", 4))),
        "qformer_input_ids": lambda: text["input_ids"][:, :8].clone(),
        "bbox": lambda: torch.rand(2, length, 4, generator=generator).sort(-1).values,
    }
    if pixels.dim() == 6:
        makers["aspect_ratio_ids"] = lambda: torch.ones(2, 1, dtype=torch.long)
        makers["aspect_ratio_mask"] = lambda: torch.ones(2, 1, tiles, dtype=torch.long)
        makers["cross_attention_mask"] = lambda: torch.ones(2, length, 1, tiles, dtype=torch.long)
    if pixels.dim() == 3 and "pixel_values" in form:
        makers["image_position_ids"] = lambda: _grid().repeat(2, 1, 1)
        makers["spatial_shapes"] = lambda: torch.tensor([[SIDE, SIDE]] * 2)
        makers["pixel_attention_mask"] = lambda: torch.ones(pixels.shape[:2], dtype=torch.long)
    return {name: make() for name, make in makers.items() if name in names and name not in form}


def _grid() -> Tensor:
    """The (row, column) of every patch of a square image, (patch, 2)."""
    return torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))


def _first(length: int, count: int) -> Tensor:
    """Marks ``count`` positions after the first four, (2, length)."""
    at = torch.arange(length)
    return ((at >= 4) & (at < 4 + count)).repeat(2, 1)
