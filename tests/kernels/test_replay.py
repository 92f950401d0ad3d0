"""Calls that come again: started without being decided anew, on their own tensors, and only where that is the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("triton", reason="the Triton engine is an optional extra")

from headscope.kernels import attention, blocks, divergence, gpu_engine, gpu_passes, replay, spans
from headscope.kernels.checks.cases import Case, random_case
from headscope.kernels.checks.compare import compare
from headscope.kernels.masks import Mask
from headscope.kernels.request import Columns, Request
from headscope.kernels.streaming import engine as streaming
from headscope.kernels.triton import device, features

TARGETS = torch.randint(-1, 22, (1, 20, 2), generator=torch.Generator().manual_seed(0))
REQUESTS = {
    "lse, entropy": Request(output=False, lse=True, entropy=True),
    "output": Request(lse=True),
    "targets": Request(output=False, targets=TARGETS),
    "columns": Request(output=False, columns=(Columns(sum=True), Columns((3, 9), sum=True, max=True))),
}


@pytest.fixture(autouse=True)
def poison() -> None:
    """Room that is filled is no room: a recording would not be kept."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's interpreter ran is a start, as on a card what Triton compiled; its own torch operations are no part
    of the call."""

    def start(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        with _disable_current_modes():
            kernel[grid](*args, **options)
        replay.started(lambda *whole: kernel[grid](*whole, **options), args)

    monkeypatch.setattr(device, "_start", start)


def case(seed: int, kind: str = "causal", **options: Any) -> Case:
    return random_case(kind, kv_heads=1, queries=20, keys=20, d_head=16, seed=seed, **options)


def wrong(one: Case, request: Request) -> list[Any]:
    return [x for x in compare(one.run(gpu_engine.attend, request), one, request) if not x.holds]


def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing can be decided: what still runs is a recording."""
    for module, name in ((gpu_engine, "_Call"), (gpu_passes, "_rows"), (gpu_passes, "_columns")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("decided anew"))


@pytest.mark.parametrize("name", REQUESTS)
def test_the_third_call_is_right_and_decides_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2):
        assert not wrong(case(seed, "left padding", sinks=True), REQUESTS[name])
    undecided(monkeypatch)
    assert not wrong(case(2, "left padding", sinks=True), REQUESTS[name])
    with pytest.raises(pytest.fail.Exception):  # another call is no recording
        wrong(case(2, "left padding"), REQUESTS[name])


def test_the_second_layer_of_a_decoding_step_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(seed: int, keys: int) -> Case:
        return random_case("causal", kv_heads=1, queries=1, keys=keys, d_head=16, seed=seed)

    request = Request(lse=True, entropy=True)
    for keys in (20, 21):  # a length comes once
        assert not wrong(step(0, keys), request)
        with monkeypatch.context() as patch:
            undecided(patch)
            assert not wrong(step(1, keys), request)
            with pytest.raises(pytest.fail.Exception):
                wrong(step(1, keys + 1), request)


SPANS = [(0, 5), (5, 12), (12, 20)]
COMPOSED: dict[str, Callable[[Case, Tensor], Any]] = {
    "spans": lambda one, lse: spans.span_outputs(one, one.v, SPANS, engine="triton"),
    "spans of one example": lambda one, lse: spans.span_outputs(_first(one), one.v[:1], SPANS[1:], engine="triton"),
    "spans, from lse": lambda one, lse: spans.span_outputs(_first(one), one.v[:1], SPANS, lse=lse[:1], engine="triton"),
    "divergence": lambda one, lse: divergence.divergence(one, replace(one, k=one.v), engine="triton"),
    "top keys": lambda one, lse: gpu_passes.top_keys(one.q, one.k, lse, count=3, **one.device_arguments),
    "top keys of one query": lambda one, lse: gpu_passes.top_keys(
        one.q[:, :, -1:],
        one.k,
        lse[:, :, -1:].contiguous(),
        count=3,
        **{**one.device_arguments, "mask": Mask.causal(19)},
    ),
    "blocks": lambda one, lse: (blocks.blocks(one, size=16, lse=lse, engine="triton"),),
}


def _first(one: Case) -> Case:
    return replace(one, q=one.q[:1], k=one.k[:1], mask=one.mask.select_batch(0, 1))


@pytest.mark.parametrize("name", COMPOSED)
def test_calls_of_several_launches_are_started_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(seed: int) -> Any:
        one = random_case("causal", kv_heads=1, queries=20, keys=20, d_head=16, d_value=16, seed=seed)
        lse = one.run(streaming.attend, Request(output=False, lse=True)).lse
        return COMPOSED[name](one, lse)

    monkeypatch.setattr(gpu_passes, "FEWEST_OF_ONE", 0)
    decided, *_ = [call(seed) for seed in range(2)]
    monkeypatch.setattr(device, "_start", lambda *_, **__: pytest.fail("decided anew"))
    for x, y in zip(call(0), decided, strict=True):
        assert torch.equal(x, y)


DIFFERENT: dict[str, Callable[[Case], Case]] = {
    "scale": lambda x: replace(x, scale=0.5),
    "softcap": lambda x: replace(x, softcap=2.0),
    "query offset": lambda x: replace(x, mask=replace(x.mask, query_offset=5)),
    "key offset": lambda x: replace(x, mask=replace(x.mask, key_offset=-3)),
    "left": lambda x: replace(x, mask=replace(x.mask, left=4)),
    "right": lambda x: replace(x, mask=replace(x.mask, right=2)),
    "chunk": lambda x: replace(x, mask=replace(x.mask, chunk=7)),
    "start": lambda x: replace(x, mask=replace(x.mask, start=torch.tensor([3, 0]))),
    "end": lambda x: replace(x, mask=replace(x.mask, end=torch.tensor([20, 11]))),
    "keys": lambda x: replace(x, k=x.k[:, :, :-1].contiguous(), v=x.v[:, :, :-1].contiguous()),
    "strides": lambda x: replace(x, k=x.k.transpose(1, 2).contiguous().transpose(1, 2).expand(2, 1, 20, 16) * 1.0),
    "half precision": lambda x: replace(x, q=x.q.half(), k=x.k.half(), v=x.v.half()),
    "alignment": lambda x: replace(x, k=_shifted(x.k)),
    "one key head an example": lambda x: replace(x, k=x.k[:1].expand(2, -1, -1, -1)),
}


def _shifted(x: Tensor) -> Tensor:
    """The same numbers, 4 bytes further."""
    room = torch.zeros(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


def test_a_call_that_differs_in_one_thing_is_another() -> None:
    request = REQUESTS["lse, entropy"]
    for seed in range(3):
        assert not wrong(case(seed), request)
    for what, different in DIFFERENT.items():
        assert not wrong(different(case(4)), request), what
    assert [kept is None for kept in replay._KINDS.values()].count(False) == 1


def test_passes_are_recorded_where_the_call_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    near = torch.arange(20)[:, None] < torch.tensor([1, 4])
    request = Request(output=False, lse=True, linear=near, columns=(Columns(sum=True),))
    for seed in range(2):
        assert not wrong(case(seed), request)
    monkeypatch.setattr(gpu_passes, "_rows", lambda *_, **__: pytest.fail("decided anew"))
    monkeypatch.setattr(gpu_passes, "_columns", lambda *_, **__: pytest.fail("decided anew"))
    assert not wrong(case(2), request)


ELSEWHERE = torch.ones(3)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: (x + 1.0,),
        lambda x: (torch.empty(3).fill_(2.0),),
        lambda x: (_start(x.clone()),),
        lambda x: (_start(ELSEWHERE),),
        lambda x: _start((1, [ELSEWHERE])) and (torch.empty(3),),
        lambda x: (_start(x) if x.sum() > 0 else None,),
        lambda x: (_start(torch.empty(2, 3))[0],),
        lambda x: (_start(x),),
    ],
    ids=[
        "an operation",
        "a fill",
        "a copy",
        "a tensor from elsewhere",
        "one in a list",
        "a look",
        "a part",
        "an input back",
    ],
)
def test_what_would_not_be_the_same_is_not_recorded(run: Callable[[Tensor], Any]) -> None:
    for _ in range(3):
        replay.again(lambda: run(x), [x := torch.ones(3)], "call")
    assert list(replay._KINDS.values()) == [None]


def test_what_is_derived_of_an_input_is_of_the_calls_own() -> None:
    seen = []

    @features.kept
    def double(x: Tensor) -> Tensor:
        return 2.0 * x

    def call(x: Tensor) -> None:
        def run() -> tuple[Tensor]:
            replay.started(lambda made, _: seen.append(made), (double(x), room := torch.empty(3)))
            return (room,)

        replay.again(run, [x], "call")

    for n in range(4):
        call(torch.full((3,), float(n)))
    assert [x.tolist() for x in seen] == [[4.0] * 3, [6.0] * 3]


def _start(x: Any) -> Any:
    replay.started(lambda _: None, (x,))
    return x


def test_tensors_in_a_list_are_the_calls_own() -> None:
    seen: list[Any] = []
    for n in range(4):
        x = torch.full((3,), float(n))

        def run(x: Tensor = x) -> tuple[Tensor]:
            replay.started(lambda given, _: seen.append(given), (["a", (x,)], room := torch.empty(3)))
            return (room,)

        replay.again(run, [x], "call")
    assert [(type(given), given[1][0].tolist()) for given in seen] == [(list, [2.0] * 3), (list, [3.0] * 3)]


class Descriptor:
    """What the copy engine is given: a tensor, and how it is read."""

    def __init__(self, base: Tensor) -> None:
        self.base, self.block_shape = base, [1]


def test_a_compiled_kernel_is_given_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inputs, of room, also in tuples; a descriptor keeps its tensor. Another torch makes room its own way."""
    seen: list[Any] = []

    def launcher(*args: Any, stream: Any) -> None:
        seen.append(args)

    def call(x: Tensor) -> Tensor:
        def run() -> tuple[Tensor]:
            room = torch.empty(1, 3)
            replay.started(launcher, (x, (room, None, 7), Descriptor(x), 1.5), compiled=True)
            return (room[0],)

        return replay.again(run, [x], "call")[0]  # type: ignore[return-value]

    inputs = [torch.full((3,), float(n)) for n in range(4)]
    results = [call(x) for x in inputs[:3]]
    monkeypatch.setattr(replay, "_EMPTY", {})
    results.append(call(inputs[3]))
    for (at, inside, descriptor, number), x, room in zip(seen, inputs[2:], results[2:], strict=True):
        assert at == x.data_ptr() and inside == (room.data_ptr(), None, 7) and number == 1.5
        assert descriptor.base is x and descriptor.block_shape == [1]
        assert room.shape == (3,) and room.stride() == (1,) and room.dtype == torch.float32


def test_gradients_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    one, request = replace(case(0), q=case(0).q.requires_grad_()), Request(output=False, lse=True)
    monkeypatch.setattr(attention.reference, "attend", lambda *_, **__: 1 / 0)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            lse = attention.attend(one, one.v, request=request).lse
            assert lse is not None and not lse.requires_grad and torch.is_grad_enabled() == enabled
            with pytest.raises(ZeroDivisionError):
                attention.attend(one, one.v, request=request, engine="reference")
            assert torch.is_grad_enabled() == enabled


def test_a_recording_holds_no_tensor_and_gives_room_of_its_own() -> None:
    def call(x: Tensor) -> Tensor:
        return replay.again(lambda: (_start(torch.empty(1, 3))[0],), [x], "call")[0]

    results = [call(torch.ones(3)) for _ in range(4)]
    assert [kept for kept in replay._KINDS.values() if kept is not None]
    assert len({x.data_ptr() for x in results}) == 4 and all(x.shape == (3,) for x in results)
    seen = [weakref.ref(x) for x in results]
    del results
    gc.collect()
    assert not any(x() is not None for x in seen)


def test_only_so_many_kinds_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 4)
    x = torch.ones(3)
    for n in range(20):
        for _ in range(3):
            replay.again(lambda: (_start(torch.empty(3)),), [x], n)
    assert len(replay._KINDS) == 4 and len(replay._ONCE) <= 4


def test_masks_and_requests_tell_all_their_fields() -> None:
    """A field that neither ``numbers`` nor ``tensors`` tells would let one call be started as another."""
    assert set(Mask.__dataclass_fields__) - {"examples"} == {
        *("query_offset", "key_offset", "left", "right", "chunk", "rule"),
        *("start", "end", "origin", "segments"),
    }
    assert len(Mask().numbers) == 6 and len(Mask().tensors) == 4
    assert len(Request().numbers) + len(Request().tensors) == len(Request.__dataclass_fields__)
