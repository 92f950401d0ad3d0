"""One decoding step over a static cache: what changes from step to step, as tensors in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from headscope.interp.sites.huggingface.masks import LazyMask
from headscope.kernels.masks import Mask

MASK = "attention_mask"
CACHE = "past_key_values"


class EndsMask(LazyMask):
    """A mask of one token, whose rule says where its keys begin and end; what it is for other functions follows from
    that alone, on the device."""

    def original(self, implementation: str) -> Tensor | None:
        """A mask (batch, 1, 1, key) as transformers makes it for ``"sdpa"`` and ``"eager"``."""
        start, end, dtype = self.rule.start, self.rule.end, self.arguments.get("dtype", torch.float32)
        if implementation not in ("sdpa", "eager") or end is None:
            return super().original(implementation)
        if implementation not in self.originals:
            at = torch.arange(self.shape[-1], device=self.device)
            seen = at < end[:, None]
            seen = (seen if start is None else seen & (at >= start[:, None]))[:, None, None]
            hidden = torch.finfo(dtype).min
            self.originals[implementation] = seen if implementation == "sdpa" else (~seen).to(dtype) * hidden
        return self.originals[implementation]


@dataclass(eq=False)
class Step:
    """The arguments of a forward pass over one token: ``tensors`` and ``others`` by name, the cache, and the masks by
    the name of a kind of layers ("" where there is one mask)."""

    tensors: dict[str, Tensor]
    others: dict[str, Any]
    cache: StaticCache
    masks: dict[str, LazyMask]
    end: Tensor  # (batch,): where the keys end that the token sees

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
        """The step of a call of ``forward``; None for every other pass, and for what a step cannot say: windows, other
        caches, masks that are tensors."""
        ids, cache, mask = (kwargs.get(name) for name in ("input_ids", CACHE, MASK))
        if args or not isinstance(ids, Tensor) or ids.shape[1:] != (1,):
            return None
        masks: dict[str, Any] = mask if isinstance(mask, dict) else {"": mask}
        if not _is_static(cache, ids.device) or not masks or not all(_is_plain(each) for each in masks.values()):
            return None
        rest = {name: x for name, x in kwargs.items() if name not in (CACHE, MASK)}
        tensors = {name: x for name, x in rest.items() if isinstance(x, Tensor)}
        others = {name: x for name, x in rest.items() if name not in tensors}
        if not all(x is None or isinstance(x, bool | int | float | str) for x in others.values()):
            return None
        first: LazyMask = next(iter(masks.values()))
        end = torch.full(ids.shape[:1], first.rule.query_offset + 1, device=ids.device)
        return cls(tensors, others, cache, masks, end if first.rule.end is None else torch.minimum(end, first.rule.end))

    @property
    def mask(self) -> LazyMask:
        """The first of its masks; all have one position."""
        return next(iter(self.masks.values()))

    @property
    def offset(self) -> int:
        """The token's position, padding counted."""
        return self.mask.rule.query_offset

    @property
    def kind(self) -> Any:
        """What steps have in common that run the same kernels on the same memory."""
        shapes = {name: (x.shape, x.dtype, x.device) for name, x in self.tensors.items()}
        masks = {name: (tuple(each.shape), each.rule.start is None) for name, each in self.masks.items()}
        first = self.cache.layers[0]  # all are made together
        memory = first.keys.data_ptr(), first.cumulative_length.data_ptr()
        return id(self.cache), *memory, *shapes.items(), *masks.items(), *self.others.items()

    def inputs(self) -> dict[str, Any]:
        """The arguments, with masks that say where the token's keys begin and end, and nothing of its position."""
        masks = {name: self._by_ends(each) for name, each in self.masks.items()}
        mask = masks[""] if "" in masks else masks
        return {**self.tensors, **self.others, CACHE: self.cache, MASK: mask}

    def _by_ends(self, mask: LazyMask) -> LazyMask:
        rule = replace(mask.rule, right=None, end=self.end)
        return EndsMask(tuple(mask.shape), mask.device, rule, mask.arguments)

    def held(self) -> Step:
        """A copy with tensors of its own, into which ``load`` copies the next steps'."""
        tensors = {name: x.clone() for name, x in self.tensors.items()}
        masks = {}
        for name, each in self.masks.items():
            start = each.rule.start
            rule = replace(each.rule, start=None if start is None else start.clone())
            masks[name] = LazyMask(tuple(each.shape), each.device, rule, each.arguments)
        return Step(tensors, self.others, self.cache, masks, self.end.clone())

    def load(self, step: Step) -> None:
        """Hold ``step``, one of the same kind."""
        for name, x in self.tensors.items():
            x.copy_(step.tensors[name])
        for name, mask in self.masks.items():
            start, given = mask.rule.start, step.masks[name].rule.start
            if start is not None and given is not None:
                start.copy_(given)
        self.end.copy_(step.end)

    def rewind(self) -> None:
        """The cache has not read this token yet, and holds nothing of it."""
        at = self.offset
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(at)
            layer.keys[:, :, at], layer.values[:, :, at] = 0, 0

    def read(self) -> list[Tensor]:
        """What the cache holds of this token, and how far it has read, layer by layer."""
        at = self.offset
        found = [(layer.keys[:, :, at], layer.values[:, :, at], layer.cumulative_length) for layer in self.cache.layers]
        return [x.clone() for each in found for x in each]

    @contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """Whatever runs inside the block, the cache holds afterwards what it holds now of this step's token: what
        ``read`` gives, which the block is told."""
        at, held = self.offset, self.read()
        try:
            yield held
        finally:
            for layer, key, value, count in zip(self.cache.layers, held[::3], held[1::3], held[2::3], strict=True):
                layer.keys[:, :, at], layer.values[:, :, at] = key, value
                layer.cumulative_length.copy_(count)


def _is_static(cache: Any, device: torch.device) -> bool:
    """Whether a cache's layers keep their keys in place on ``device`` and count them there alone."""
    return (
        type(cache) is StaticCache
        and not cache.offloading  # whose keys move
        and bool(cache.layers)
        and all(type(each) is StaticLayer and each.is_initialized for each in cache.layers)
        and all(isinstance(each.cumulative_length, Tensor) for each in cache.layers)
        and cache.layers[0].keys.device == device  # asked in every step: weights of one device make one device's keys
    )


def _is_plain(mask: Any) -> bool:
    """Whether a mask hides later tokens and padding, and nothing else."""
    if not isinstance(mask, LazyMask) or mask.gaps:
        return False
    rule: Mask = replace(mask.rule, start=None, end=None)
    return rule.is_plain_causal and rule.key_offset == 0
