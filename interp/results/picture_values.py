"""Values of a picture's tokens, laid out where the tokens come from: what is drawn over the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.grids import Box, ImageGrid
from headscope.interp.prompts.look import Look


@dataclass(frozen=True, eq=False)
class PictureValues:
    """One number for every cell of a picture's ``grid``.

    Attributes:
        values: dimensions (..., row, column), the others by name: layer, head, step.
        grid: where the cells lie.
        picture: bytes (height, width, 3).
        unit: of a value.
        marked: (layer, row, column) bool: cells to mark, such as sink tokens; None: none.
        boxes: of named objects, in pixels.
        name: of the chat.
        title: what the values are.
    """

    values: xr.DataArray
    grid: ImageGrid
    picture: NDArray[np.uint8]
    unit: str = "mass"
    title: str = "Attention"
    marked: xr.DataArray | None = None
    boxes: Mapping[str, Box] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        if self.values.dims[-2:] != ("row", "column") or self.values.shape[-2:] != self.grid.shape:
            raise HeadscopeError(
                f"values {dict(self.values.sizes)} do not end on the grid's (row, column) {self.grid.shape}"
            )

    def mean(self, dim: str = "head") -> PictureValues:
        """Their mean over a dimension."""
        return replace(self, values=self.values.mean(dim))

    def sel(self, **at: Any) -> PictureValues:
        """Those of chosen layers, heads or steps."""
        try:
            return replace(self, values=self.values.sel(**at))
        except KeyError as error:
            raise HeadscopeError(f"there are no values at {at}: {dict(self.values.sizes)}") from error

    def mark(self, tokens: Mapping[int, Sequence[int]]) -> PictureValues:
        """With the cells marked that hold these tokens of the prompt, by layer: a picture's sinks."""
        layers = self.values["layer"].to_numpy().tolist() if "layer" in self.values.coords else []
        if not layers:
            raise HeadscopeError("tokens are marked by layer, and these values have no layers")
        held = np.stack([np.isin(self.grid.positions, list(tokens.get(layer, ()))) for layer in np.atleast_1d(layers)])
        return replace(self, marked=xr.DataArray(held, {"layer": np.atleast_1d(layers)}, ("layer", "row", "column")))

    def flat(self) -> NDArray[np.float64]:
        """(..., token), in raster order."""
        return np.asarray(self.values.to_numpy(), dtype=np.float64).reshape(*self.values.shape[:-2], -1)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: a row a cell."""
        return self.values.to_dataframe("value").reset_index()


def place(
    one: Look, values: NDArray[Any], dims: Sequence[str], coordinates: Mapping[str, Any], **facts: Any
) -> list[PictureValues]:
    """Values of a chat's tokens (..., token) on each of its pictures' grids; ``dims`` name the leading dimensions."""
    found = []
    for grid in one.grids:
        laid = xr.DataArray(grid.of(values), {k: list(v) for k, v in coordinates.items()}, (*dims, "row", "column"))
        boxes = dict(one.item.boxes) if grid.image == 0 else {}
        found.append(PictureValues(laid, grid, one.pictures[grid.image], boxes=boxes, name=one.item.name, **facts))
    return found
