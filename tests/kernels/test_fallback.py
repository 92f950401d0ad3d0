"""A kernel that does not compile: the next engine answers, with one warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the Triton engine is an optional extra")

from headscope.kernels import blocks, columns, divergence, gpu_engine
from headscope.kernels import gpu_passes as passes
from headscope.kernels.checks.broken import Broken
from headscope.kernels.checks.cases import Case, everything, random_case
from headscope.kernels.checks.compare import allowed, compare, distance
from headscope.kernels.fallback import EngineWarning, is_compilers
from headscope.kernels.hopper import dispatch as hopper
from headscope.kernels.request import Reduced
from headscope.kernels.triton import blocks as triton_blocks
from headscope.kernels.triton import columns as triton_columns
from headscope.kernels.triton import divergence as triton_divergence
from headscope.kernels.triton import heaviest as triton_heaviest
from headscope.kernels.triton import rows as triton_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # kernels read no CPU memory where there is a card


def small(**options: Any) -> Case:
    return random_case("causal", kv_heads=1, group=1, queries=70, keys=70, d_head=16, device=DEVICE, **options)


def once(run: Callable[[], Any], broken: Broken, engine: str) -> Any:
    """What ``run`` gives: it warns the first time, names the next engine and the cause, and does not try again."""
    with pytest.warns(EngineWarning, match=f"does not compile .*error code -11.*{engine}"):
        run()
    tried = broken.tried
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run()
    assert tried == broken.tried == 1
    return again


@pytest.mark.parametrize("module", [triton_rows, triton_columns, triton_heaviest])
def test_streaming_answers_a_request(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, case = Broken(), small(sinks=True)
    monkeypatch.setattr(module, "_kernel", broken)
    request = everything(case)
    got: Reduced = once(lambda: case.run(gpu_engine.attend, request), broken, "streaming")
    assert not [v for v in compare(got, case, request) if not v.holds]


def test_streaming_computes_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, case = Broken(), small()
    monkeypatch.setattr(triton_columns, "_kernel", broken)
    lse = case.eager(everything(case)).lse
    assert lse is not None
    got = once(lambda: columns.columns(case, lse.float(), engine="triton"), broken, "streaming")
    want, low = case.pattern().sum(2), case.pattern(torch.float32).double().sum(2)
    assert distance(got.sum, want) <= allowed(low, want, size=case.score_size())


def test_streaming_pools_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, case = Broken(), small()
    monkeypatch.setattr(triton_blocks, "_kernel", broken)
    got = once(lambda: blocks.blocks(case, engine="triton", size=16), broken, "streaming")
    want, low = (blocks.dense(case.pattern(x).double(), case.mask, 16) for x in (torch.float64, torch.float32))
    assert distance(got, want) <= allowed(low, want, size=case.score_size())


def test_streaming_computes_divergences(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, one, other = Broken(), small(), small(seed=1)
    monkeypatch.setattr(triton_divergence, "_kernel", broken)
    got = once(lambda: divergence.divergence(one, other, engine="triton"), broken, "streaming")
    want = divergence.dense(one.log_pattern(), other.log_pattern()).js
    low = divergence.dense(one.log_pattern(torch.float32), other.log_pattern(torch.float32)).js
    assert distance(got.js, want) <= allowed(low, want, size=max(one.score_size(), other.score_size()))


def test_triton_answers_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="the kernels for Hopper are written in Gluon")
    from headscope.kernels.hopper import columns as hopper_columns
    from headscope.kernels.hopper import output as hopper_output
    from headscope.kernels.hopper import rows as hopper_rows

    monkeypatch.setattr(hopper, "_on_hopper", lambda _: True)
    monkeypatch.setattr(hopper, "FEWEST", 1)
    sizes = {"batch": 1, "kv_heads": 1, "group": 1, "queries": 70, "keys": 70, "d_head": 64}
    case = random_case("causal", **sizes, dtype=torch.float16, device=DEVICE)
    call = {"mask": case.mask, "scale": case.scale}
    for module, v in ((hopper_rows, None), (hopper_output, case.v)):
        broken = Broken()
        monkeypatch.setattr(module, "_kernel", broken)
        wants = frozenset({"lse"} if v is None else {"lse", "output"})
        got = once(lambda v=v, wants=wants: passes.rows(case.q, case.k, v, wants=wants, **call), broken, "Triton")
        assert got.lse.isfinite().all() and (v is None or got.output.isfinite().all())
    broken = Broken()
    monkeypatch.setattr(hopper_columns, "_kernel", broken)
    sums, _ = once(lambda: passes.columns(case.q, case.k, got.lse, **call), broken, "Triton")
    # 70 rows of mass 1, each weight a float32 exponential of a score below 32: 70 x 32 roundings
    assert abs(float(sums.sum()) - 70) <= 70 * 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("spent"), KeyError("a bug of ours")])
def test_other_errors_stay_errors(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "_kernel", Broken(error))
    case = small()
    with pytest.raises(type(error)):
        case.run(gpu_engine.attend, everything(case))


def test_a_kernel_that_failed_while_it_ran_is_not_hidden() -> None:
    class OnCard:
        is_cuda = True

    said = ["an illegal memory access was encountered", "misaligned address", "device-side assert triggered"]
    ran = [RuntimeError(f"Triton Error [CUDA]: {what}") for what in said]
    assert not any(is_compilers(error, OnCard()) for error in ran)  # type: ignore[arg-type]
    assert is_compilers(RuntimeError("Triton Error [CUDA]: out of resources"), OnCard())  # type: ignore[arg-type]
