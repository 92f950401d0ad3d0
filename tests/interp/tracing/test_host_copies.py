"""Statistics that are on their way to host memory are not read before they are there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import DynamicCache

from headscope.interp.sites.inputs import example_inputs
from headscope.interp.statistics import Entropy, KeyMass, LogSumExp, SpanMass
from headscope.interp.statistics.queries import Every
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing import host_copies as landing
from headscope.interp.tracing.host_copies import HostCopies
from headscope.interp.tracing.recording import trace

STATISTICS = [LogSumExp(), Entropy(), SpanMass({"start": (0, 2), "rest": (2, 9)}), KeyMass()]


class Late(HostCopies):
    """In a GPU's place: a copy holds NaN until it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[Tensor, Tensor]] = []

    def send(self, value: Tensor) -> Tensor:
        copy = torch.full_like(value, torch.nan)
        self.sent.append((copy, value))
        return copy

    def wait(self) -> None:
        for copy, value in self.sent:
            copy.copy_(value)
        self.sent.clear()


def passes(model: torch.nn.Module, ids: Tensor) -> xr.Dataset:
    """Two batches, the second read in chunks and continued token by token; half of the rows, and the record midway."""
    with trace(model, STATISTICS, queries=Every(2)) as tracer:
        model(ids, use_cache=False)
        assert not np.isnan(tracer.record.entropy.values).any()
        cache = DynamicCache(config=model.config)
        for part in (ids[:, :5], ids[:, 5:], ids[:, :1], ids[:, :1]):
            model(part, past_key_values=cache, use_cache=True)
    return tracer.record


def test_the_record_waits_for_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = passes(model, ids)
    monkeypatch.setattr("headscope.interp.tracing.tracer.HostCopies", Late)
    xr.testing.assert_equal(passes(model, ids), expected)


def test_the_records_of_several_kinds_of_layers_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and whole images become records when the pass ends."""
    model = tiny_model("qwen2_5_vl", "image-text")
    inputs = example_inputs(model)

    def records() -> list[xr.Dataset]:
        with trace(model, [Entropy()], tower="vision") as tracer:
            model(**inputs)
        return tracer.records

    expected = records()
    monkeypatch.setattr("headscope.interp.tracing.tracer.HostCopies", Late)
    for found, right in zip(records(), expected, strict=True):
        xr.testing.assert_equal(found, right)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sends_large_statistics_and_the_record_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").cuda()
    ids = torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(0)).cuda()
    expected = passes(model, ids)
    for large in (0, 2 * 4 * 2 * 4):  # all; those of the larger chunks alone, whose pieces then lie in two places
        monkeypatch.setattr(landing, "LARGE", large)
        xr.testing.assert_equal(passes(model, ids), expected)
