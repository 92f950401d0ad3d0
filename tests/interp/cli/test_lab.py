"""``headscope lab``: one experiment, as a table and as JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headscope.interp.cli import COMMANDS
from headscope.interp.cli.app import app
from headscope.interp.errors import HeadscopeError
from headscope.interp.laboratory.variants import VARIANTS

SMALL = ["scan_and_snap", "--device", "cpu", "--seeds", "0,1", "--set", "steps=2", "--set", "small_steps=2"]
SWEEP = ["--set", "sweep_last=[1]", "--set", "sweep_rates=[1.0]", "--set", "sweep_ratios=[1.0]", "--set", "length=12"]


def run(*arguments: str, command: str = "lab") -> str:
    for name in COMMANDS:
        __import__(f"headscope.interp.cli.{name}")
    found = CliRunner().invoke(app, [command, *arguments])
    if found.exception is not None:
        raise found.exception
    return found.stdout


def test_json_holds_every_number_and_the_folder_the_findings(tmp_path: Path) -> None:
    shown = json.loads(run(*SMALL, *SWEEP, "--json", "--out", str(tmp_path)))
    held = json.loads((tmp_path / "scan_and_snap" / "findings.json").read_text())
    by_name = {row["number"]: row for row in shown["numbers"]}
    for name in held["outcomes"][0]["numbers"]:
        values = [outcome["numbers"][name] for outcome in held["outcomes"]]
        assert by_name[name]["seeds"] == 2 and by_name[name]["low"] == pytest.approx(min(values), nan_ok=True)
    assert len(shown["claims"]) == len(held["claims"]) > 0
    assert (tmp_path / "scan_and_snap" / "page.html").exists()
    assert "what held" in run(*SMALL, *SWEEP, "--out", str(tmp_path))  # from what is there
    run(*SMALL, *SWEEP, "--quick", "--out", str(tmp_path / "quick"))
    quick = json.loads((tmp_path / "quick" / "scan_and_snap" / "findings.json").read_text())["settings"]
    assert quick["steps"] == 2 and quick["length"] == 12  # what is asked for stands


def test_attention_variants_are_listed() -> None:
    rows = json.loads(run("variants", "--json", command="list"))["variants"]
    assert [row["name"] for row in rows] == list(VARIANTS)
    assert all(row["summary"] and row["source"] and row["settings"] == [] for row in rows)


def test_what_cannot_be_run_is_one_line() -> None:
    with pytest.raises(HeadscopeError, match="--set is of one experiment"):
        run("all", "--set", "steps=2")
    with pytest.raises(HeadscopeError, match="there is no experiment 'sinks'"):
        run("sinks")
