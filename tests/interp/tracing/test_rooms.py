"""A record in arrays that were prepared during the pass is the record, and nobody else holds them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from headscope.interp.statistics import Entropy, KeyMass, SpanMass
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing import rooms
from headscope.interp.tracing.recording import trace
from headscope.interp.tracing.rooms import Rooms
from headscope.interp.tracing.tracer import Tracer

STATISTICS = [Entropy(), SpanMass({"start": (0, 2), "rest": (2, 9)}), KeyMass(), KeyMass("mean")]


class AtOnce:
    """A thread that is always done."""

    def submit(self, run: Callable[..., np.ndarray], *given: object) -> Future[np.ndarray]:
        made: Future[np.ndarray] = Future()
        made.set_running_or_notify_cancel()
        made.set_result(run(*given))
        return made


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """In a GPU's place: every array is prepared, and holds numbers that are no record's."""
    made: list[np.ndarray] = []

    def touched(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        made.append(np.full(shape, 77, dtype))
        return made[-1]

    monkeypatch.setattr(Rooms, "idles", lambda *_: True)
    monkeypatch.setattr(rooms, "LARGE", 0)
    monkeypatch.setattr(rooms, "_touched", touched)
    monkeypatch.setattr(rooms, "_thread", AtOnce)
    return made


def tokens() -> Tensor:
    return torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(0))


def traced(model: nn.Module, run: Callable[[Tracer], None], **options: object) -> xr.Dataset:
    with trace(model, STATISTICS, **options) as tracer:  # type: ignore[arg-type]
        run(tracer)
    return tracer.record


def whole(model: nn.Module) -> Callable[[Tracer], None]:
    return lambda tracer: model(tokens(), use_cache=False) and None


def held(record: xr.Dataset, arrays: list[np.ndarray]) -> set[str]:
    """The variables that stand in ``arrays``."""
    return {str(name) for name, x in record.items() if any(np.shares_memory(x.values, array) for array in arrays)}


def unprepared(model: nn.Module, run: Callable[[Tracer], None], **options: object) -> xr.Dataset:
    with pytest.MonkeyPatch.context() as here:
        here.setattr(Rooms, "idles", lambda *_: False)
        return traced(model, run, **options)


@pytest.mark.parametrize("layers", [None, [1]])
def test_one_pass_stands_in_the_arrays_that_were_prepared(prepared: list[np.ndarray], layers: list[int] | None) -> None:
    model = tiny_model("llama")
    found = traced(model, whole(model), layers=layers)
    assert held(found, prepared) == {"entropy", "span_mass", "key_mass", "key_mass_mean"}
    before = len(prepared)
    xr.testing.assert_equal(found.drop_attrs(), unprepared(model, whole(model), layers=layers).drop_attrs())
    assert len(prepared) == before


def test_a_record_that_is_asked_for_again_is_another(prepared: list[np.ndarray]) -> None:
    model = tiny_model("llama")
    with trace(model, STATISTICS) as tracer:
        model(tokens(), use_cache=False)
        first = tracer.record
        kept = first.copy(deep=True)
        first["entropy"].values[:] = 0.0
        xr.testing.assert_equal(tracer.record, kept)
    assert held(tracer.record, prepared) == set()


def test_padding_and_further_passes_take_arrays_that_fit(prepared: list[np.ndarray]) -> None:
    """A batch of two lengths, a prompt that is continued, and one that broke off."""
    model, ids = tiny_model("llama"), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def padded(tracer: Tracer) -> None:
        model(ids, attention_mask=mask, use_cache=False)

    def continued(tracer: Tracer) -> None:
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache, use_cache=True)

    def broken(tracer: Tracer) -> None:
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids, use_cache=False)
        hook.remove()
        model(ids[:, :5], use_cache=False)

    for run in (padded, continued, broken):
        statistics = [Entropy(), SpanMass({"start": (0, 2)}), KeyMass()]
        records = []
        for idle in (True, False):
            with pytest.MonkeyPatch.context() as here, trace(model, statistics) as tracer:
                here.setattr(Rooms, "idles", lambda *_, idle=idle: idle)
                run(tracer)
            record = tracer.record
            assert bool(held(record, prepared)) == (idle and run is not continued)
            records.append(record.drop_attrs())
        xr.testing.assert_equal(*records)


def test_a_fork_takes_memory_of_its_own(prepared: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with trace(model, STATISTICS) as tracer:
        model(tokens(), use_cache=False)
    here = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)  # its thread would never be done
    assert held(tracer.record, prepared) == set()


def test_a_thread_makes_room() -> None:
    array = rooms._thread().submit(rooms._touched, (3, 2), np.dtype(np.float32)).result()
    assert array.shape == (3, 2) and array.dtype == np.float32 and not array.any() and array.flags.writeable
