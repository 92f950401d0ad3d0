"""What a tracer keeps of the residual stream: chosen positions of every prompt, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headscope.interp.attention.stream import StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics import Statistic
from headscope.interp.statistics.exactness import CONDITIONS
from headscope.interp.statistics.stream import Resid

_Pass = dict[tuple[str, int], Tensor]  # variable, layer -> (batch, position, d_model)


class StreamRecord:
    """The stream at the places and positions of ``statistics``, of every finished pass that begins a prompt."""

    def __init__(self, statistics: Sequence[Statistic]) -> None:
        self.statistics = {each.recorded[0]: each for each in statistics if isinstance(each, Resid)}
        self._pass: _Pass = {}
        self._done: list[_Pass] = []

    @property
    def places(self) -> tuple[str, ...]:
        """The places of the stream that are read."""
        return tuple(dict.fromkeys(each.place for each in self.statistics.values()))

    def see(self, call: StreamCall) -> None:
        """Keep what passes one place, unless the pass continues a cache.

        Raises:
            HeadscopeError: the pass is under a condition that ``Resid`` refuses.
        """
        wanted = {name: one for name, one in self.statistics.items() if one.place == call.place}
        if call.offset:
            if self._done and call.x.shape[1] > 1:
                self._refuse("chunked prefill")
            return
        at = call.position
        first = torch.where(at < 0, at.shape[1], at).amin(1)
        if bool(((at >= 0).sum(1) < at.amax(1) + 1 - first).any()):
            self._refuse("gaps")
        if any((name, call.layer) in self._pass for name in wanted):
            raise HeadscopeError(
                f"{call.place} of layer {call.layer} of {call.module} comes more than once in a forward pass, which is "
                "not recorded; trace another tower, or one image at a time"
            )
        x = call.x.detach()
        for name, statistic in wanted.items():
            rows = call.rows(statistic.positions)
            self._pass[name, call.layer] = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2])).float().cpu()

    def _refuse(self, condition: str) -> None:
        raise HeadscopeError(
            f"{', '.join(self.statistics)}: the residual stream is not recorded with {CONDITIONS[condition]} "
            f"({Resid.refused[condition]}); leave Resid out, or trace inputs without that"
        )

    def end_forward(self) -> None:
        """The pass is whole: it is kept."""
        if self._pass:
            self._done.append(self._pass)
        self._pass = {}

    def abort_forward(self) -> None:
        """Forget a pass that broke off."""
        self._pass = {}

    def clear(self) -> None:
        """Forget everything."""
        self._pass, self._done = {}, []

    def dataset(self) -> xr.Dataset | None:
        """All of it, or None where nothing was asked for or no pass finished."""
        if not self._done:
            return None
        variables = {}
        for name, statistic in self.statistics.items():
            layers = sorted(layer for at, layer in self._done[0] if at == name)
            batches = [torch.stack([one[name, layer] for layer in layers], 1) for one in self._done]
            x = torch.cat(batches).numpy()
            coordinates = {"example": np.arange(len(x)), "layer": layers, **statistic.axes}
            dims = ("example", "layer", statistic.named("position"), "d_model")
            variables[name] = xr.DataArray(x, coordinates, dims)
        return xr.Dataset(variables)

    def beside(self, record: xr.Dataset) -> xr.Dataset:
        """A record of attention with the stream of its layers in it.

        Raises:
            HeadscopeError: it has other examples.
        """
        found = self.dataset()
        if found is None:
            return record
        if found.sizes["example"] != record.sizes["example"]:
            raise HeadscopeError(
                f"the stream was seen in {found.sizes['example']} examples and attention in {record.sizes['example']}; "
                "trace them apart"
            )
        return record.assign(found.sel(layer=record["layer"]).assign_coords(example=record["example"]).data_vars)
