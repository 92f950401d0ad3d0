"""Statistics as a user may write them, and that every one of the room is registered."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import xarray as xr

from headscope.interp import HeadscopeError, trace
from headscope.interp.statistics import STATISTICS, Entropy, KeyMass, Resid, SinkMass, SpanMass
from headscope.interp.statistics.declared import declared
from headscope.interp.survey.tiny import tiny_model

ROOM = Path(__file__).parents[3] / "interp" / "statistics"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (Entropy(), (Entropy(),)),
        (Entropy, (Entropy(),)),
        ("entropy", (Entropy(),)),
        ("sink-mass", (SinkMass(),)),
        ([Entropy, "key_mass", Resid("attn_out")], (Entropy(), KeyMass(), Resid("attn_out"))),
        ((each for each in ["entropy", KeyMass]), (Entropy(), KeyMass())),
    ],
)
def test_one_or_several_by_object_class_or_name(written, meant) -> None:
    assert declared(written) == meant


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (5, "5 is no statistic"),
        ([Entropy(), 5], "5 is no statistic"),
        ("entropi", "did you mean 'entropy'"),
        ([SpanMass], "SpanMass needs at least one named span"),
        ([dict], "is no statistic"),
        ([], "name at least one statistic"),
    ],
)
def test_what_is_no_statistic_gets_one_line(written, said) -> None:
    model = tiny_model("llama")
    with pytest.raises(HeadscopeError, match=said) as error, trace(model, written):
        pass
    assert "\n" not in str(error.value)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_name_records_what_the_object_does() -> None:
    model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7, 8]])
    with trace(model, "entropy") as named, trace(model, [Entropy()]) as built:
        model(input_ids=ids)
    xr.testing.assert_equal(named.record, built.record)


def test_every_statistic_of_the_room_is_registered() -> None:
    """A class with a name of its own is one that a user can ask for."""
    named = set()
    for path in ROOM.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and any(
                isinstance(line, ast.AnnAssign)
                and ast.unparse(line.target) == "name"
                and isinstance(line.value, ast.Constant)
                and line.value.value
                for line in node.body
            ):
                named.add(f"headscope.interp.statistics.{path.stem}:{node.name}")
    own = {place for place in STATISTICS.places.values() if place.startswith("headscope.")}
    assert named and named == own
