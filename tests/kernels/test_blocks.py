"""Pooled maps and heaviest blocks against the dense pattern."""

from __future__ import annotations

import functools

import pytest
import torch

from headscope.kernels import blocks as module
from headscope.kernels.blocks import Pool, blocks, dense, top_blocks
from headscope.kernels.checks.cases import MASKS, Case, random_case
from headscope.kernels.checks.compare import allowed, distance
from headscope.kernels.streaming import weights

ENGINES = ["streaming", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def holds(case: Case, got: torch.Tensor, size: int, pool: Pool) -> bool:
    want = dense(case.pattern(), case.mask, size, pool)
    lossy = dense(case.pattern(case.q.dtype).double(), case.mask, size, pool)
    return got.shape == want.shape and distance(got, want) <= allowed(lossy, want, size=case.score_size())


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_maps_under_every_mask(kind: str, engine: str) -> None:
    case = random_case(kind, kv_heads=1, group=1, queries=40, keys=70, device=DEVICE)
    for pool in ("sum", "mean", "max"):
        assert holds(case, blocks(case, size=16, pool=pool, engine=engine), 16, pool)


@pytest.mark.parametrize("size", [1, 7, 16, 32, 64, 128])
@pytest.mark.parametrize("engine", ENGINES)
def test_block_sizes_and_logit_options(size: int, engine: str) -> None:
    case = random_case(
        "causal",
        batch=1,
        kv_heads=1,
        queries=63,
        keys=90,
        softcap=5.0,
        sinks=True,
        bias=True,
        dtype=torch.float16,
        device=DEVICE,
    )
    for pool in ("sum", "max"):
        assert holds(case, blocks(case, size=size, pool=pool, engine=engine), size, pool)


@pytest.mark.parametrize("size", [7, 16, 100])
def test_streaming_folds_rows_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "log_weights", functools.partial(weights.log_weights, held=900))
    case = random_case("left padding", queries=40, keys=40)
    for pool in ("sum", "max"):
        assert holds(case, blocks(case, size=size, pool=pool, engine="streaming"), size, pool)


@pytest.mark.parametrize("kind", ["causal", "left padding", "window", "empty rows"])
@pytest.mark.parametrize("held", [1, 1 << 20])
def test_heaviest_blocks_and_what_they_leave_out(kind: str, held: int) -> None:
    case = random_case(kind, queries=60, keys=60)
    got = top_blocks(case, size=8, top=3, held=held, engine="streaming")
    want = dense(case.pattern(), case.mask, 8, "mean")
    mass = want.topk(3).values
    assert torch.allclose(got.mass.double(), mass, atol=1e-5)
    picked = want.gather(-1, got.index.clamp(min=0)) * (got.index >= 0)
    assert torch.allclose(picked, mass, atol=1e-5)
    assert torch.allclose(got.residual.double(), want.sum(-1) - mass.sum(-1), atol=1e-5)


def test_a_block_holds_something() -> None:
    case = random_case("causal", queries=4, keys=4)
    with pytest.raises(ValueError, match="block"):
        blocks(case, size=0)
