"""One query on a cache by the streaming engine's short way, against the float64 definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headscope.kernels.checks.cases import random_case
from headscope.kernels.checks.compare import compare
from headscope.kernels.masks import Mask
from headscope.kernels.request import Columns, Request
from headscope.kernels.scores import Scores
from headscope.kernels.streaming import engine, one_row

ONE = Request(
    lse=True, max=True, entropy=True, distance=True, top=5, columns=(Columns(sum=True, max=True, count=True),)
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(
    "mask",
    [
        Mask(query_offset=40, right=None),
        Mask.causal(40),
        Mask.causal(25),
        Mask.causal(45, window=12),
        Mask.causal(30, window=7),
        Mask(query_offset=22, key_offset=3),
    ],
    ids=["all", "causal", "a static cache", "behind a window", "a window in a static cache", "keys that begin later"],
)
def test_one_query_that_sees_a_run_of_keys(mask: Mask, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_Pass", lambda *_: pytest.fail("a tile of many rows"))
    case = replace(random_case("full", queries=1, keys=41, d_value=24, dtype=dtype), mask=mask)
    linear = torch.randn(2, 41, 3, generator=torch.Generator().manual_seed(1))
    for request in (replace(ONE, linear=linear), replace(ONE, linear=linear[0], output=False)):
        assert [x for x in compare(case.run(engine.attend, request), case, request) if not x.holds] == []


def test_no_two_columns_share_a_tensor() -> None:
    case = random_case("full", queries=1, keys=41)
    both = Columns(sum=True, max=True)
    found = case.run(engine.attend, Request(columns=(both, both, Columns(max=True)))).columns
    tensors = [x for each in found for x in (each.sum, each.max) if x is not None]
    assert len({x.data_ptr() for x in tensors}) == len(tensors) == 5


def test_one_query_from_which_keys_are_hidden_in_between_is_a_tile() -> None:
    case = random_case("full", queries=1, keys=41)
    masks = Mask(chunk=8), Mask(start=torch.tensor([3, 0])), Mask(query_offset=-50), Mask(right=None)
    calls = [Scores(case.q, case.k, mask, 1.0) for mask in masks]
    taken = [one_row.attend(call, case.v, Request(), 1 << 20) is not None for call in calls]
    assert taken == [False, False, False, True]
    assert one_row.attend(calls[-1], case.v, Request(), 40) is None  # more scores than may be held
