"""Whatever writes to a folder refuses what is no path in one line, before it loads a model or reads anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from headscope.interp import load_record, sweep
from headscope.interp.analysis.taxonomy import taxonomy
from headscope.interp.cache.survey import lose
from headscope.interp.cache.texts import long_context_scores
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads import discover
from headscope.interp.heads.lookup.previous_token import PreviousToken
from headscope.interp.laboratory.experiment import run_experiment
from headscope.interventions import evaluate
from headscope.interventions.evaluation.masking import masking
from headscope.interventions.exporting import export
from headscope.probes.circuits.finding import find_circuit
from headscope.probes.circuits.study import study_circuit
from headscope.probes.linear.activations import head_outputs
from headscope.probes.linear.heads import probe_heads
from headscope.probes.patching.path import path_patching

WRITE = [
    *(sweep, discover, lose, long_context_scores, taxonomy, run_experiment, evaluate, masking, export),
    *(find_circuit, study_circuit, head_outputs, probe_heads, path_patching),
]


@pytest.mark.parametrize("function", WRITE, ids=lambda function: function.__name__)
def test_a_folder_that_is_no_path_is_one_line(function: Callable[..., Any]) -> None:
    needed = {
        name: [PreviousToken()] if name == "methods" else None
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    with pytest.raises(HeadscopeError, match="3 is no folder: give the path of one"):
        function(**{**needed, "out": 3})


def test_a_record_that_is_no_path_is_one_line() -> None:
    with pytest.raises(HeadscopeError, match="3 is no folder"):
        load_record(3)  # type: ignore[arg-type]
