"""Scores and kept keys beside kvpress, where it is installed: it asks for an older transformers, so CI has none."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "interp" / "benchmarks" / "beside_kvpress.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("kvpress") is None, reason="kvpress is not installed")
def test_policies_are_those_of_kvpress(tmp_path: Path) -> None:
    """Two float32 implementations of sums over at most 160 keys, on scores that differ by 1e-5 of the largest."""
    out = tmp_path / "beside.json"
    command = [sys.executable, str(SCRIPT), "--tokens", "160", "--budget", "80", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    for row in json.loads(out.read_text())["rows"]:
        assert row["largest_difference"] < 1e-4 and row["gap"] < 1e-4, row
        assert row["same_keys"] > 0.999, row
