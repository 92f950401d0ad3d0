"""Patching at 8,192 tokens makes no tensor of the size of a map; how much memory it takes is in probes/benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headscope.probes.benchmarks import long_prompts

LENGTH = 8192


class Largest(TorchDispatchMode):
    """The most numbers that any tensor held that was made inside, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // max(1, x.element_size()))
        return out


@pytest.mark.slow
def test_no_tensor_is_a_map() -> None:
    """Two layers of one head: no tensor holds more than a sixteenth of a map's 67 million numbers."""
    lm, pairs, short = long_prompts.model("llama", 1, LENGTH), long_prompts.pair(LENGTH), long_prompts.pair(32)
    for name in ("activation patching", "path patching", "attribution patching"):
        long_prompts.METHODS[name](lm, short)  # what verification makes of its own is not counted
        with Largest() as seen:
            found = long_prompts.METHODS[name](lm, pairs)
        assert np.isfinite(getattr(found, "scores", found).mean).any() and seen.numbers <= 1 << 22, name
