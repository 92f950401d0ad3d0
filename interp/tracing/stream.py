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
from headscope.interp.statistics.stream import Resid

_Pass = dict[tuple[str, int], Tensor]  # place, layer -> (batch, position, d_model)


class StreamRecord:
    """The stream at the places and positions of ``statistics``, of every finished pass that begins a prompt."""

    def __init__(self, statistics: Sequence[Statistic]) -> None:
        self.statistics = {each.place: each for each in statistics if isinstance(each, Resid)}
        self._pass: _Pass = {}
        self._done: list[_Pass] = []

    def see(self, call: StreamCall) -> None:
        """Keep what passes one place, unless the pass continues a cache."""
        if call.offset:
            return
        if (call.place, call.layer) in self._pass:
            raise HeadscopeError(
                f"{call.place} of layer {call.layer} of {call.module} comes more than once in a forward pass, which is "
                "not recorded; trace another tower, or one image at a time"
            )
        rows = call.rows(self.statistics[call.place].positions)
        x = call.x.detach()
        self._pass[call.place, call.layer] = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2])).float().cpu()

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
        for place, statistic in self.statistics.items():
            layers = sorted(layer for at, layer in self._done[0] if at == place)
            batches = [torch.stack([one[place, layer] for layer in layers], 1) for one in self._done]
            x = torch.cat(batches).numpy()
            coordinates = {"example": np.arange(len(x)), "layer": layers, "position": list(statistic.positions)}
            variables[place] = xr.DataArray(x, coordinates, ("example", "layer", "position", "d_model"))
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
