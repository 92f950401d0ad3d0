"""Settings of statistics and selections that mean nothing get one line, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from headscope.interp import statistics as s
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics.queries import Every, Last
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace

COUNTED: list[Callable[[Any], Any]] = [
    s.SinkMass,
    s.WindowMass,
    s.WindowedDistance,
    s.TopKeys,
    s.BlockMap,
    s.TopBlocks,
    lambda n: s.TopBlocks(16, n),
    Every,
    Last,
]


@pytest.mark.parametrize("make", COUNTED)
@pytest.mark.parametrize("number", [0, -1, 1.5, "a", True, None])
def test_what_counts_is_a_whole_number_from_1_on(make: Callable[[Any], Any], number: Any) -> None:
    with pytest.raises(HeadscopeError, match="needs a whole number from 1 on$"):
        make(number)
    make(3)


@pytest.mark.parametrize("cls", [s.SpanMass, s.SpanOutput, s.Rollout])
@pytest.mark.parametrize("span", [(-3, -1), (5, 2), (2.5, 4), (1, 2, 3), 7, [(0, 1), (3, 2)]])
def test_a_span_counts_from_the_first_token(cls: Any, span: Any) -> None:
    with pytest.raises(HeadscopeError, match="is no span: .*count from the example's first token"):
        cls({"a": span})
    cls({"a": (0, 4), "b": "published later"})


@pytest.mark.parametrize("target", [[0, 1], torch.arange(4), torch.zeros(1, 4), None])
def test_a_target_is_a_function_or_a_table(target: Any) -> None:
    with pytest.raises(HeadscopeError, match="target 'a' is neither a function"):
        s.TargetMass({"a": target})


@pytest.mark.parametrize("layers", [0, "0", [1.0], ["0"], [True], None.__class__])
def test_layers_are_numbers(layers: Any) -> None:
    with pytest.raises(HeadscopeError, match="names no layers: give their numbers"):
        with trace(tiny_model("llama"), s.Entropy(), layers=layers):
            raise AssertionError("the block must not be entered")


def test_rows_that_are_not_there() -> None:
    model, ids = tiny_model("llama"), torch.arange(5, 15)[None]
    with pytest.raises(HeadscopeError, match=r"'mean', queries=\(10, 20\)\): the pass has query rows 0 to 9"):
        with trace(model, s.KeyMass("mean", queries=(10, 20))):
            model(ids)
    with pytest.raises(HeadscopeError, match="selects no rows: give Last"):
        with trace(model, s.Entropy(), queries=5):  # type: ignore[arg-type]
            raise AssertionError("the block must not be entered")


def test_weights_that_are_no_numbers() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(HeadscopeError, match="weights that are not numbers, first in model.layers.0.mlp.up_proj"):
        with trace(model, s.Entropy()):
            raise AssertionError("the block must not be entered")
