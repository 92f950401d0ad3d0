"""Features as the kernels read them: without loss, in runs of equal tiles, and made anew once they change."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from headscope.kernels.triton.features import decode, encode, runs, width


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_encoded_features_decode_to_themselves(dtype: torch.dtype) -> None:
    positions = torch.arange(5000.0)[:, None] * torch.tensor([1.0, 0.37])
    columns = encode(positions, dtype)
    kept = columns[:, : width(positions, dtype)].float()
    assert columns.shape[1] == 16 and not columns[:, kept.shape[1] :].any()
    error = (decode(kept, positions, dtype) - positions).abs() / positions.clamp(min=1)
    assert error.max() <= 2**-22  # three numbers of 8 bits, or two of 11, hold 22 bits or more


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [65_504.5, 65_520.0, 1e6, 3e30, 1e-6, 1e-30])
def test_columns_of_any_size_decode_to_themselves(size: float, dtype: torch.dtype) -> None:
    """float16 ends at 65,504: from 65,520 it rounds to infinity, of which the rest was NaN."""
    features = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([size, 1.0])
    columns = encode(features, dtype)
    assert columns.isfinite().all()
    back = decode(columns[:, : width(features, dtype)].float(), features, dtype)
    assert ((back - features).abs() <= 2.0**-16 * features.abs()).all()  # the contract, number by number


def test_a_column_wider_than_half_precision_is_held_in_float32() -> None:
    features = torch.logspace(-20, 20, 50)[:, None]
    columns = encode(features, torch.float16)
    assert columns.dtype == torch.float32 and torch.equal(decode(columns[:, :1], features, torch.float16), features)


def brute(columns: Tensor, keys: int) -> list[int]:
    """``runs`` of one example, tile by tile."""
    tiles = [columns[n : n + keys].unique(dim=0) for n in range(0, columns.shape[0], keys)]
    kinds = [None if len(tile) > 1 else tuple(tile[0].tolist()) for tile in tiles]
    found = []
    for n, kind in enumerate(kinds):
        until = next((m for m in range(n, len(kinds)) if kinds[m] != kind), len(kinds))
        found.append(-until if kind is None else until)
    return found


@pytest.mark.parametrize("length", [1, 16, 100, 257])
def test_runs_of_spans(length: int) -> None:
    gen = torch.Generator().manual_seed(length)
    for _ in range(20):
        edges = torch.randint(0, length + 1, (3, 4), generator=gen).sort(-1).values
        at = torch.arange(length)
        batch = torch.stack([torch.stack([(at >= a) & (at < z) for a, z in (e[:2], e[2:])], -1) for e in edges])
        assert runs(batch, 16).tolist() == [brute(columns, 16) for columns in batch]
        assert runs(batch[0], 16).tolist() == [brute(batch[0], 16)]


def test_what_was_made_of_features_is_made_again_when_they_change() -> None:
    features = torch.zeros(64, 1, dtype=torch.bool)
    before = encode(features, torch.bfloat16)
    assert encode(features, torch.bfloat16) is before
    features[3] = True
    assert encode(features, torch.bfloat16)[3, 0] == 1.0
    assert runs(encode(features, torch.bfloat16), 16).tolist() == [[-1, 4, 4, 4]]


def test_nothing_outlives_the_features() -> None:
    features = torch.zeros(64, 1, dtype=torch.bool)
    columns = encode(features, torch.bfloat16)
    runs(columns, 16)
    made = weakref.ref(columns)
    del features, columns
    gc.collect()
    assert made() is None
