"""The committed measurement of memory at long prompts still runs: every method, on the pair that it begins with."""

from __future__ import annotations

import pytest

from headscope.probes.benchmarks.long_prompts import METHODS, model, pair


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_takes_the_short_pair(name: str) -> None:
    assert METHODS[name](model("llama", 2, 64), pair(32)) is not None
