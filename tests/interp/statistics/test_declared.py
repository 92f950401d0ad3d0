"""Statistics as a user may write them, and that every one of the room is registered."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import xarray as xr

from headscope.interp import HeadscopeError, trace
from headscope.interp.attention.stream import PLACES
from headscope.interp.statistics import STATISTICS, Entropy, KeyMass, Resid, SinkMass, SpanMass
from headscope.interp.statistics.declared import declared, unit_of
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


GIVEN = {"span_mass": {"spans": {"a": (0, 2)}}, "z_span": {"spans": {"a": (0, 2)}}, "js_divergence": {"kept": None}}
GIVEN["target_mass"] = {"targets": {"previous": lambda at: at - 1}}
SETTINGS = {
    "key_mass": [{"reduce": reduce} for reduce in ("sum", "mean", "max")],
    "resid": [{"place": x} for x in PLACES],
}


@pytest.mark.parametrize("name", STATISTICS)
def test_every_variable_has_a_unit_and_every_source_a_number(name: str) -> None:
    cls = STATISTICS[name]
    for settings in SETTINGS.get(name, [{}]):
        written = cls(**{**GIVEN.get(name, {}), **settings}).variables
        assert cls.unit and all(map(unit_of, written)), f"{written}: unit of the first, units of the others"
        assert set(cls.units) >= set(written) - {cls.name}
    assert re.fullmatch(r"(arXiv \d{4}\.\d{4,5}|doi 10\.\d{4,}/\S+)?", cls.source)


def test_a_unit_is_that_of_the_registered_variable() -> None:
    assert (unit_of("entropy"), unit_of("late.entropy")) == ("nats", "nats")
    assert (unit_of("key_mass"), unit_of("key_mass_max")) == ("mass, summed over queries", "mass")
    assert unit_of("nothing_of_that_name") == ""


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
