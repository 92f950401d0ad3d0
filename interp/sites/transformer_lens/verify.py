"""Proof, once per bridge, that what we read from its hooks is what it computes: pattern and z, on a padded prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.sites.agreement import Verification, relative_error


def bound_of(call: AttentionCall) -> float:
    """How far two right patterns of this call may differ anywhere (see ``headscope.interp.sites.agreement``)."""
    return relative_error(call)


class Check:
    """Compares every layer's AttentionCall with the bridge's own ``hook_pattern`` and ``hook_z``."""

    def __init__(self) -> None:
        self.found = Verification()

    def pattern(self, call: AttentionCall, theirs: Tensor) -> None:
        """``theirs`` (batch, head, query, key)."""
        self.found.calls += 1
        self.found.layers.setdefault(call.module, []).append(call.layer)
        self._judge("pattern", call, theirs, call.pattern(), bound_of(call))

    def output(self, call: AttentionCall, theirs: Tensor) -> None:
        """``theirs`` (batch, head, query, d_value): a gate or a norm between the heads and hook_z shows here."""
        size = float(call.value.float().abs().amax())
        self._judge("hook_z", call, theirs, call.output(), bound_of(call) * size)

    def _judge(self, what: str, call: AttentionCall, theirs: Tensor, ours: Tensor, bound: float) -> None:
        real = call.mask.query_is_real(torch.arange(call.query.shape[2], device=call.query.device))
        difference = (theirs.float() - ours.float()).abs().amax((1, 3))
        if real is not None:
            difference = difference.masked_fill(~real, 0.0)
        worst = float(difference.max())
        self.found.largest_difference = max(self.found.largest_difference, worst)
        self.found.worst = max(self.found.worst, worst / max(bound, 1e-38))
        if not worst <= bound:
            self.found.problems.append(
                f"the {what} of layer {call.layer} differs from what its hooks show by {worst:.2g}, bound {bound:.2g}"
            )


def judge_layers(check: Check, layers: list[Any]) -> Verification:
    """The verdict, with a problem for each layer whose hooks did not fire exactly once."""
    for layer in layers:
        if layer.fired != 1:
            check.found.problems.append(f"{layer.prefix}.hook_pattern fired {layer.fired} times in one pass, not once")
    return check.found
