"""Feature columns in half precision without loss: a value that it cannot hold becomes a sum of columns that it can."""

from __future__ import annotations

import torch
from torch import Tensor


def _parts(dtype: torch.dtype) -> int:
    return {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}[dtype]


def _is_exact(features: Tensor, dtype: torch.dtype) -> bool:
    if dtype == torch.float32 or features.dtype in (torch.bool, torch.uint8, torch.int8, dtype):
        return True
    return bool((features.to(dtype).to(features.dtype) == features).all())


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


def decode(linear: Tensor, features: Tensor, dtype: torch.dtype) -> Tensor:
    n = features.shape[-1]
    if _is_exact(features, dtype):
        return linear[..., :n]
    parts = linear[..., : n * _parts(dtype)].contiguous()
    return parts.view(*parts.shape[:-1], _parts(dtype), n).sum(-2)
