"""Watch: what is measured of a model while it learns, declared statistics of every head and numbers of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headscope.interp.statistics.declared import Named
from headscope.interp.tracing.recording import trace


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Measures every ``every`` steps, without gradients and in evaluation mode.

    Args:
        every: steps between two measurements.
        inputs: arguments of the model for the pass in which ``statistics`` are recorded, the same at every step.
        statistics: declared statistics, or their names.
        numbers: of the model, by name.
    """

    every: int
    inputs: Mapping[str, Any] | None = None
    statistics: tuple[Named, ...] = ()
    numbers: Callable[[Any], Mapping[str, float]] | None = None

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """``numbers``, and of each variable of the statistics its mean over examples and rows: one list a layer, with a
        value a head (None where there is none)."""
        was = model.training
        model.eval()
        found: dict[str, Any] = {}
        try:
            with torch.no_grad():
                if self.numbers is not None:
                    found |= {name: float(value) for name, value in self.numbers(model).items()}
                if self.statistics:
                    found |= self._recorded(model)
        finally:
            model.train(was)
        return found

    def _recorded(self, model: nn.Module) -> dict[str, Any]:
        device = next(model.parameters()).device
        given = {name: x.to(device) if hasattr(x, "to") else x for name, x in (self.inputs or {}).items()}
        with trace(model, self.statistics) as tracer:
            model(**given)
        record, found = tracer.record, {}
        for name, variable in record.data_vars.items():
            if {"layer", "head"} <= set(variable.dims):
                rest = [dim for dim in variable.dims if dim not in ("layer", "head")]
                values = variable.astype("float64").mean(rest, skipna=True).transpose("layer", "head").to_numpy()
                found[str(name)] = [[None if math.isnan(x) else float(x) for x in row] for row in values]
        return found
