"""The handler that measures, at every layer's call, what policies lose there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import Policy
from headscope.interp.cache.reading import Reading
from headscope.interp.results.cache import MEASURES
from headscope.interp.sites.rotary import Layer, Rotation
from headscope.kernels.kept import Keep, Kept, fewest, losses
from headscope.kernels.request import Reduced, Request

AHEAD = Mapping[Layer, Tensor]
NEEDED = 0.95  # of the mass on kept keys: what "needed" counts


class Ahead(Handler):
    """Keeps each layer's queries of the rows from ``first`` on."""

    only_reads = True

    def __init__(self, first: int) -> None:
        self.first = first
        self.queries: dict[Layer, Tensor] = {}

    def request(self, call: AttentionCall) -> Request:
        self.queries[call.module, call.layer] = call.query[:, :, self.first :].clone()
        return Request()


class Measuring(Handler):
    """Measures one text whose prompt has ``prompt`` tokens, in the rows ``measured = (first, stop)``."""

    only_reads = True

    def __init__(
        self,
        policies: Sequence[Policy],
        budgets: Sequence[Budget],
        prompt: int,
        measured: tuple[int, int],
        rotations: Mapping[Layer, Rotation],
    ) -> None:
        self.policies, self.budgets, self.prompt, self.measured = policies, budgets, prompt, measured
        self.rotations = rotations
        self.ahead: Mapping[int, AHEAD] = {}
        self.carried: list[dict[int, Tensor]] = [{} for _ in policies]
        self.layers: dict[int, dict[str, NDArray[np.float64]]] = {}
        self.overlaps: list[Tensor] = []

    def request(self, call: AttentionCall) -> Request:
        """The lse of the measured rows, in the layer's own pass."""
        return Request(lse=True, query_rows=torch.arange(*self.measured, device=call.query.device))

    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        """Keep every measure (policy, budget, head) of this layer, means over the rows."""
        stop = torch.full((1,), self.prompt, device=call.query.device)
        place = call.module, call.layer
        reading = Reading(call, stop, self.measured, self.rotations.get(place))
        keeps: list[Keep] = []
        for i, policy in enumerate(self.policies):
            own = self.ahead.get(i, {}).get(place)
            told = reading if own is None else replace(reading, ahead=own)
            told = replace(told, carried=self.carried[i]) if "carried" in policy.needs else told
            keeps += policy.keeps(told, self.budgets)
        found = losses(call.inputs(), call.value, keeps, queries=self.measured, lse=reduced.lse, counted=reading.keys)
        each = {name: [getattr(one, name)[0].nanmean(-1) for one in found] for name in Kept._fields}
        mass = self._mass(reading)
        none = torch.full_like(each["recall"][0], torch.nan)
        each["needed"] = [
            fewest(mass.masked_fill(~keep[0], 0.0), NEEDED) if isinstance(keep, Tensor) else none for keep in keeps
        ]
        count = len(self.budgets)
        self.overlaps.append(
            torch.stack([overlap([_fixed(keep, reading) for keep in keeps[b::count]]) for b in range(count)], -1)
        )
        shape = len(self.policies), count, call.query.shape[1]
        self.layers[call.layer] = {
            name: torch.stack(values).view(shape).double().cpu().numpy() for name, values in each.items()
        }

    def _mass(self, reading: Reading) -> Tensor:
        """What the measured rows put on each key of the prompt: (head, key)."""
        first, stop = (torch.full_like(reading.stop, n) for n in self.measured)
        return reading.received(first, stop)[0].masked_fill(~reading.keys, 0.0)

    def full(self, layers: int, heads: int) -> dict[str, NDArray[np.float64]]:
        """Every measure by the model's own layer index: (policy, budget, layer, head), NaN where nothing attended; and
        ``overlap`` (policy, policy, budget), the mean over layers."""
        shape = len(self.policies), len(self.budgets), layers, heads
        found = {name: np.full(shape, np.nan) for name in MEASURES}
        for layer, own in self.layers.items():
            for name, values in own.items():
                found[name][:, :, layer] = values
        found["overlap"] = torch.stack(self.overlaps).mean(0).cpu().numpy()
        return found


def _fixed(keep: Keep, reading: Reading) -> Tensor | None:
    """The prompt's keys that a policy keeps for all rows: bool (head, key)."""
    if not isinstance(keep, Tensor):
        return None
    return (keep & reading.keys[:, None])[0].expand(reading.call.query.shape[1], -1)


def overlap(sets: Sequence[Tensor | None]) -> Tensor:
    """The mean over heads of the Jaccard index of every two of ``sets``, bool (head, key): (set, set), NaN for None."""
    found = torch.full((len(sets), len(sets)), torch.nan, dtype=torch.float64)
    for i, a in enumerate(sets):
        for j, b in enumerate(sets[: i + 1]):
            if a is not None and b is not None:
                share = (a & b).sum(-1).double() / (a | b).sum(-1).clamp(min=1)
                found[i, j] = found[j, i] = share.mean().cpu()
    return found
