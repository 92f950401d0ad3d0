"""Feature columns as the GPU kernels read them: in half precision without loss, and which tiles of keys share a row.

What is made of a features tensor is kept while that lives and stays as it is: all layers of a model ask for it again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


def _kept(make: Callable[..., T]) -> Callable[..., T]:
    """``make(features, *rest)``, remembered; not where a CUDA graph is captured, whose memory is the graph's."""
    memory: Any = WeakTensorKeyDictionary()

    @wraps(make)
    def recall(features: Tensor, *rest: Any) -> T:
        if features.is_inference() or (features.is_cuda and torch.cuda.is_current_stream_capturing()):
            return make(features, *rest)
        version, known = memory.get(features, (None, {}))
        if version != features._version:
            known = {}
            memory[features] = features._version, known
        if rest not in known:
            known[rest] = make(features, *rest)
        found: T = known[rest]
        return found

    return recall


def _parts(dtype: torch.dtype) -> int:
    return {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}[dtype]


@_kept
def _is_exact(features: Tensor, dtype: torch.dtype) -> bool:
    if dtype == torch.float32 or features.dtype in (torch.bool, torch.uint8, torch.int8, dtype):
        return True
    return bool((features.to(dtype).to(features.dtype) == features).all())


@_kept
def encode(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns in ``dtype``, padded to a tile's width. Values it cannot hold become a sum of columns that it can."""
    if _is_exact(features, dtype):
        columns = [features.to(dtype)]
    else:
        rest, columns = features.float(), []
        for _ in range(_parts(dtype)):
            columns.append(rest.to(dtype))
            rest = rest - columns[-1].float()
    x = torch.cat(columns, -1)
    width = max(16, 1 << (x.shape[-1] - 1).bit_length())  # of a tile
    return torch.nn.functional.pad(x, (0, width - x.shape[-1])).contiguous()


def width(features: Tensor, dtype: torch.dtype) -> int:
    """How many columns ``encode`` makes of ``features``, padding not counted."""
    return features.shape[-1] * (1 if _is_exact(features, dtype) else _parts(dtype))


def decode(linear: Tensor, features: Tensor, dtype: torch.dtype) -> Tensor:
    """The linear statistics of ``features`` from those of the columns that ``encode`` made of them."""
    if _is_exact(features, dtype):
        return linear
    return linear.view(*linear.shape[:-1], _parts(dtype), features.shape[-1]).sum(-2)


@_kept
def runs(columns: Tensor, keys: int) -> Tensor:
    """Where ``columns`` (key, n) or (batch, key, n) stay the same: (batch or 1, tile of ``keys`` keys) int32.

    Of a tile whose keys all have the same row of columns, the number of the first later tile that differs from it; of
    other tiles, minus the number of the first later tile that is not so mixed.
    """
    columns = columns[None] if columns.dim() == 2 else columns
    batch, length, n = columns.shape
    count = -(-length // keys)
    last = columns[:, -1:].expand(-1, count * keys - length, -1)
    tiles = torch.cat([columns, last], 1).view(batch, count, keys, n)
    first = tiles[:, :, 0]
    mixed = (tiles != first[:, :, None]).flatten(2).any(-1)
    new = (mixed[:, 1:] != mixed[:, :-1]) | (~mixed[:, 1:] & (first[:, 1:] != first[:, :-1]).any(-1))
    number = torch.arange(1, count + 1, device=columns.device)
    ends = torch.where(torch.nn.functional.pad(new, (0, 1), value=True), number, count)
    until = ends.flip(1).cummin(1).values.flip(1)
    return torch.where(mixed, -until, until).to(torch.int32)
