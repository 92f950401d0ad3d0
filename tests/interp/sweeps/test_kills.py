"""A sweep that is killed with -9 again and again ends with the record of one that nobody killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from headscope.interp.benchmarks.interrupts import kills


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path: Path) -> None:
    """Fifty of them, of 200 parts, are what ``python -m headscope.interp.benchmarks.interrupts`` runs."""
    assert kills(6, tmp_path, prompts=80) == []
