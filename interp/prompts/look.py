"""A chat with pictures as a model reads it: inputs, spans, and where in the pictures its tokens come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.processors import processor_of
from headscope.interp.prompts.grids import ImageGrid, Made, grids_of
from headscope.interp.prompts.pictures import pixels
from headscope.interp.prompts.sequences import Sample
from headscope.interp.prompts.tokens import check_length
from headscope.interp.prompts.vision import VisionPrompt, vision_prompt
from headscope.interp.prompts.vision_data import VisionItem
from headscope.interp.statistics.spans import Span


@dataclass(frozen=True, eq=False)
class Look:
    """One chat (``item``) and its ``prompt``, a batch of one without padding."""

    lm: LanguageModel
    item: VisionItem
    prompt: VisionPrompt

    @property
    def ids(self) -> Tensor:
        """(token,)"""
        ids: Tensor = self.prompt.inputs["input_ids"][0].cpu()
        return ids

    @property
    def image(self) -> list[Span]:
        """The tokens of all pictures."""
        return self.prompt.spans["image"][0]

    @property
    def end(self) -> int:
        """Where the last picture's tokens end: text behind it can look at all of them."""
        return max(stop for _, stop in self.image)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Positions of all image tokens, ascending."""
        return np.concatenate([np.arange(*span) for span in self.image])

    @cached_property
    def pictures(self) -> list[NDArray[np.uint8]]:
        """The pictures' bytes (height, width, 3)."""
        return [pixels(one) for one in self.item.pictures]

    @cached_property
    def grids(self) -> list[ImageGrid]:
        """The grids of all pictures, in their order.

        Raises:
            HeadscopeError: a picture's tokens are no grid that is known.
        """
        processor, config = processor_of(self.lm), self.lm.inner.config
        return [grid for i in range(len(self.pictures)) for grid in grids_of(self._made(i), config, processor)]

    def grids_with(self, image: int) -> list[ImageGrid]:
        """The grids of one picture."""
        if not 0 <= image < len(self.pictures):
            raise HeadscopeError(f"this chat has pictures 0 to {len(self.pictures) - 1}, no picture {image}")
        return [grid for grid in self.grids if grid.image == image]

    def _made(self, i: int) -> Made:
        inputs, spans = self.prompt.inputs, self.prompt.spans[f"image_{i}"][0]
        seen, merged = inputs.get("pixel_values"), None
        if (grid := inputs.get("image_grid_thw")) is not None:
            merge = int(getattr(self.lm.inner.config.vision_config, "spatial_merge_size", 1))
            time, rows, columns = grid[i].tolist()
            merged = time, rows // merge, columns // merge
        height, width = self.pictures[i].shape[:2]
        ends = [0, *(stop for _, stop in spans)]
        ids, tokenizer = self.ids.tolist(), processor_of(self.lm).tokenizer
        before = [tokenizer.decode(ids[max(a, b - 16) : b]) for a, (b, _) in zip(ends, spans, strict=False)]
        size = None if seen is None or seen.dim() < 4 else (int(seen.shape[-2]), int(seen.shape[-1]))
        if size is None and merged is None:
            raise HeadscopeError("the processor gives neither pixels nor a grid, so image tokens have no place")
        return Made(spans, before, size, merged, (width, height), i)


def look(lm: LanguageModel, item: VisionItem, *, response: str | None = None) -> Look:
    """Have the model's own processor read a chat; with ``response``, an answer that ends it.

    Raises:
        HeadscopeError: as ``vision_prompt``; no image token; a box outside its picture; more tokens than the model
            takes.
    """
    chat = list(item.chat)
    if response is not None:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
    prompt = vision_prompt(lm, processor_of(lm), chat, add_generation_prompt=response is None)
    if not prompt.spans.get("image", [[]])[0]:
        raise HeadscopeError(f"the chat {item.name or item.chat!r:.60} became no image token")
    check_length(lm, prompt.inputs["input_ids"].shape[1])
    found = Look(lm, item, prompt)
    height, width = found.pictures[0].shape[:2]
    for name, (left, top, right, bottom) in item.boxes.items():
        if left >= width or top >= height or right <= 0 or bottom <= 0:
            raise HeadscopeError(
                f"the box of {name!r}, ({left:g}, {top:g}, {right:g}, {bottom:g}), lies outside its picture of {width} "
                f"x {height} pixels ({item.name or 'unnamed'}): give left, top, right, bottom in its pixels"
            )
    return found


def sample_of(lm: LanguageModel, index: int, prompt: VisionPrompt) -> Sample:
    """One chat, without padding, as what is run.

    Raises:
        HeadscopeError: several chats, or more tokens than the model takes.
    """
    ids = prompt.inputs["input_ids"]
    if ids.shape[0] != 1:
        raise HeadscopeError(
            f"prompt {index} holds {ids.shape[0]} chats, whose pictures nobody can part: give one each"
        )
    mask = prompt.inputs.get("attention_mask")
    real = torch.ones_like(ids[0], dtype=torch.bool) if mask is None else mask[0].bool()
    rest = {n: x for n, x in prompt.inputs.items() if n not in ("input_ids", "attention_mask")}
    inputs = {n: x[:, real] if is_table(x, ids.shape[1]) else x for n, x in rest.items()}
    own = ids[0][real].cpu()
    check_length(lm, len(own))
    return Sample({"sample": index}, own, inputs)


def extended(inputs: dict[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """Inputs of one example with further tokens of text at the end.

    Raises:
        HeadscopeError: several examples, or padding at the end.
    """
    old = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if old.shape[0] != 1 or (mask is not None and not bool(mask[0, -1])):
        raise HeadscopeError("go on from one example at a time, without padding at its end")
    new = torch.tensor([list(ids)], dtype=old.dtype, device=old.device)
    found = dict(inputs)
    for name, x in inputs.items():
        if is_table(x, old.shape[1]):
            fill = {"input_ids": new, "attention_mask": torch.ones_like(new)}.get(name, torch.zeros_like(new))
            found[name] = torch.cat([x, fill.to(x.dtype)], 1)
    return found


def is_table(x: Tensor, length: int) -> bool:
    """Whether an input has one value a token."""
    return tuple(x.shape[:2]) == (1, length)
