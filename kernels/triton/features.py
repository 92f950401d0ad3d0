"""Feature columns as the GPU kernels read them, without loss, and which tiles of keys share a row.

Half precision holds what fits it. Other columns become sums of two or three that fit, in float16 scaled to its range;
where a column spans more than that (2^24 between its largest and smallest number), all are multiplied in float32.

What is made of a features tensor is kept while that lives and stays as it is: all layers of a model ask for it again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from headscope.kernels.replay import derived

T = TypeVar("T")


def kept(make: Callable[..., T]) -> Callable[..., T]:
    """``make(features, *rest)``, remembered; not where a CUDA graph is captured, whose memory is the graph's.

    Whether ``features`` is as it was, torch's count of changes says. It does not count a change through ``.data``,
    ``from_numpy`` or another library: whoever makes one gives a new tensor (``masks.Mask``, ``request.Request``).
    """
    memory: Any = WeakTensorKeyDictionary()

    @wraps(make)
    def remembered(features: Tensor, *rest: Any) -> T:
        return derived(recall, features, rest)

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

    return remembered


PARTS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # columns of a type for one that it cannot hold
ROUGHEST = 2.0**-16  # relative: of a weight, half precision keeps 2^-12


@kept
def _held(features: Tensor, dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """The type of the columns of ``features`` for scores in ``dtype``, and how many of them make one of those."""
    if dtype == torch.float32 or features.dtype in (torch.bool, torch.uint8, torch.int8, dtype):
        return dtype, 1
    if bool((features.to(dtype).to(features.dtype) == features).all()):
        return dtype, 1
    whole = torch.stack(_split(features, dtype)).double().sum(0) / _scales(features, dtype)
    if bool(((whole - features).abs() <= ROUGHEST * features.abs()).all()):
        return dtype, PARTS[dtype]
    return torch.float32, 1


def _scales(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Powers of two (n,) float64 by which the columns are multiplied to fill the range of ``dtype`` from its top.

    float16 ends at 65,504, and a number below 6e-5 has fewer bits; the others have the range of float32.
    """
    n = features.shape[-1]
    if dtype != torch.float16 or features.numel() == 0:
        return features.new_ones(n, dtype=torch.float64)
    largest = features.double().abs().reshape(-1, n).amax(0)
    return torch.exp2(15.0 - torch.frexp(largest).exponent.clamp(-80, 100).double())


def _split(features: Tensor, dtype: torch.dtype) -> list[Tensor]:
    rest, columns = (features.double() * _scales(features, dtype)).float(), []
    for _ in range(PARTS[dtype]):
        columns.append(rest.to(dtype))
        rest = rest - columns[-1].float()
    return columns


@kept
def encode(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns in ``dtype``, or in float32 where sums of such are too rough, padded to a tile's width."""
    held, parts = _held(features, dtype)
    columns = [features.to(held)] if parts == 1 else _split(features, dtype)
    x = torch.cat(columns, -1)
    width = max(16, 1 << (x.shape[-1] - 1).bit_length())  # of a tile
    return torch.nn.functional.pad(x, (0, width - x.shape[-1])).contiguous()


def width(features: Tensor, dtype: torch.dtype) -> int:
    """How many columns ``encode`` makes of ``features``, padding not counted."""
    return features.shape[-1] * _held(features, dtype)[1]


@kept
def _unscale(features: Tensor, dtype: torch.dtype) -> Tensor:
    return (1.0 / _scales(features, dtype)).float()


def decode(linear: Tensor, features: Tensor, dtype: torch.dtype) -> Tensor:
    """The linear statistics of ``features`` from those of the columns that ``encode`` made of them."""
    parts = _held(features, dtype)[1]
    if parts == 1:
        return linear
    whole = linear.view(*linear.shape[:-1], parts, features.shape[-1]).sum(-2)
    return whole if dtype != torch.float16 else whole * _unscale(features, dtype)


@kept
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
