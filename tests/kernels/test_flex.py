"""What FlexAttention is given, evaluated by its own dense form on a CPU; the fused kernel is checked on the GPU.

``headscope.kernels.benchmarks.gpu_check_edits`` holds the compiled kernel to the same definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from headscope.kernels import attention, flex
from headscope.kernels.checks.cases import MASKS, Case, everything, random_case, random_edits
from headscope.kernels.checks.compare import compare
from headscope.kernels.reference import dense_mask
from headscope.kernels.request import Columns, Request
from headscope.kernels.score_edits import ScoreEdit, distance_slope

ALL_THREE = {"softcap": 5.0, "sinks": True, "bias": True}
EDITS = ("distance slope", "key scale", "distance table", "hidden keys", "two, on some heads", "every term")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine as on a GPU, with FlexAttention's dense form in the place of its kernel."""
    monkeypatch.setattr(flex, "takes", lambda q, v: True)
    yield


def edited(kind: str, name: str, **options: object) -> Case:
    case = random_case(kind, **options)  # type: ignore[arg-type]
    return replace(case, edit=random_edits(case)[name])


def run(case: Case, request: Request) -> list:
    got = case.run(flex.attend, request)
    return [v for v in compare(got, case, request, precision=torch.float32) if not v.holds]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("options", [{}, ALL_THREE], ids=["plain", "all three"])
def test_every_mask(on_cpu: None, kind: str, options: dict) -> None:
    assert not run(edited(kind, "distance slope", queries=33, keys=50, **options), Request(lse=True))


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_with_statistics_from_streaming(on_cpu: None, name: str) -> None:
    for kind in ("causal", "left padding", "shifted keys"):
        case = edited(kind, name, queries=33, keys=50, d_value=48, **ALL_THREE)
        assert not run(case, everything(case)) and not run(case, everything(case, subset=True))


def test_statistics_alone_do_not_call_it(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "attention", lambda *_, **__: pytest.fail("FlexAttention was called"))
    assert not run(edited("causal", "key scale"), Request(output=False, entropy=True, columns=(Columns(sum=True),)))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("queries, keys", [(300, 300), (256, 512), (129, 400)])
def test_blocks_are_those_of_the_dense_mask(kind: str, queries: int, keys: int) -> None:
    """No block that shows a pair may be missing; one taken as whole must be; bands are exact."""
    case = random_case(kind, queries=queries, keys=keys, d_head=8)
    seen = dense_mask(case.mask, case.q.shape, keys, torch.device("cpu"))
    pad = torch.nn.functional.pad(seen, (0, -keys % flex.BLOCK, 0, -queries % flex.BLOCK))
    tiles = pad.unflatten(3, (-1, flex.BLOCK)).unflatten(2, (-1, flex.BLOCK))
    any_, all_ = tiles.any(5).any(3), tiles.all(5).all(3)
    some, every = (x.expand_as(any_) for x in flex.visible_blocks(case.mask, queries, keys, torch.device("cpu")))
    assert (some | ~any_).all() and (all_ | ~every).all() and (some | ~every).all()
    if kind not in ("rule", "segments"):
        assert torch.equal(every, all_)
    if kind in ("causal", "full", "window", "band", "left padding", "right padding", "shifted keys"):
        assert torch.equal(some, any_)


def test_what_it_does_not_compile_is_streamed_and_says_so(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(*_: object, **__: object) -> None:
        calls.append(1)
        raise torch._dynamo.exc.Unsupported("a Python branch on a score")

    monkeypatch.setattr(flex, "attention", refuse)
    case = edited("causal", "distance slope")
    with pytest.warns(UserWarning, match="a Python branch"):
        assert not run(case, everything(case))
    assert not run(case, everything(case)) and len(calls) == 1  # once refused, an edit is not compiled again


def test_other_errors_are_not_hidden(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise IndexError("slope of head 9")

    monkeypatch.setattr(flex, "attention", broken)
    with pytest.raises(IndexError, match="head 9"):
        run(edited("causal", "distance slope"), Request())


def test_a_cpu_call_goes_to_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "attention", lambda *_, **__: pytest.fail("FlexAttention was called"))
    case = edited("causal", "distance slope")
    assert not run(case, Request(lse=True))
    assert case.run(attention.attend, Request(lse=True)).lse is not None


def test_an_edit_of_whole_tiles_is_streamed(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a chain with one of single scores, and for a part of a call's heads."""
    monkeypatch.setattr(flex, "attention", lambda *_, **__: pytest.fail("FlexAttention was called"))
    case = random_case("causal")
    single = distance_slope(torch.ones(case.q.shape[1]))
    whole = ScoreEdit(lambda s, b, h, q, k: s - s.mean(), pointwise=False)
    for edit in (whole, single.then(whole), whole.then(single), whole.on_heads([0], of=case.q.shape[1])):
        assert not edit.pointwise
        assert replace(case, edit=edit).run(flex.attend, Request()).output is not None
