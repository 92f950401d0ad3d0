"""Whether a model gives what it gives untraced while its attention is routed and computed by its own function.

Each call's function and mask are the untraced ones, so nothing but code around them can make a difference: code that
asks whether there is a mask at all finds ours where transformers leaves causality to a flag (Moonshine's decoder).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

APART = 0.02  # of the largest value: far more than kernels that add up in another order, far less than another mask


def drawn_alike(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """One pass; some models draw random numbers also in evaluation, the same ones here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(**inputs)


def other_output(model: nn.Module, inputs: Mapping[str, Any], routed: Any) -> list[str]:
    """What is wrong with ``routed``, the output of a routed pass, beside an untraced one: one line, or none.

    A cache among the inputs has grown in the first pass, so that there is no second one like it.
    """
    if inputs.get("past_key_values") is not None:
        return []
    plain, other = _values(drawn_alike(model, inputs)), _values(routed)
    if plain is None or other is None:
        return []
    size = float(plain.float().abs().max()) if plain.numel() else 0.0
    apart = float("inf") if plain.shape != other.shape else float((plain.float() - other.float()).abs().max())
    if plain.numel() == 0 or apart <= APART * max(1.0, size) or not torch.isfinite(plain).all():
        return []
    return [
        f"its output differs by {apart:.2g} from the untraced one while its attention is its own: code around it asks "
        "whether there is a mask"
    ]


def _values(output: Any) -> Tensor | None:
    """Logits, or the first floating-point tensor of what a model returns."""
    if isinstance(output, Tensor):
        return output
    found = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return next((x for x in found if isinstance(x, Tensor) and x.is_floating_point()), None)
