"""Interrupts leave nothing on a model, wherever they come."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from headscope.interp.benchmarks import interrupts
from headscope.interp.sites import is_attached
from headscope.interp.statistics import Entropy
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace


def left_at_random(count: int, seed: int) -> str:
    """What random interrupts leave of ours, in a process of its own: one that comes inside Python's ``logging`` leaves
    its lock held, and every other thread of the process then waits for ever."""
    script = f"from headscope.interp.benchmarks import interrupts; print(interrupts.at_random({count}, seed={seed}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_interrupts_at_random_leave_nothing() -> None:
    assert left_at_random(12, seed=1) == "[]"


def test_interrupts_at_lines_of_ours_leave_nothing() -> None:
    count, left = interrupts.at_every_line(stride=37)
    assert count > 20 and left == []


@pytest.mark.slow
def test_more_interrupts_and_more_lines() -> None:
    assert left_at_random(40, seed=0) == "[]"
    assert interrupts.at_every_line(stride=10)[1] == []


def test_an_interrupt_as_the_implementation_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_model("llama"), 0
    with torch.no_grad():
        plain = model(interrupts.IDS).logits
    with trace(model, [Entropy()]):
        pass
    logger = logging.getLogger("transformers.modeling_utils")
    real = logger.setLevel

    def bomb(level: int) -> None:
        nonlocal calls
        calls += 1
        real(level)
        if calls == 2:  # the implementation is set, and nothing else is done yet
            raise KeyboardInterrupt

    monkeypatch.setattr(logger, "setLevel", bomb)
    with pytest.raises(KeyboardInterrupt):
        with trace(model, [Entropy()]):
            raise AssertionError("the block must not be entered")
    assert not is_attached(model) and interrupts.leftovers(model, plain) == []
