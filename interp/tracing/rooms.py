"""The arrays that a record will have: the host takes memory for them while a GPU computes.

Fresh memory is most of what putting a record together takes: the system hands it out page by page when it is first
written to. A thread of its own does that during the pass, in which the host idles; what is written there comes later,
as it does to an array that was not prepared.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.sizes import tower_size
from headscope.interp.statistics import ROW
from headscope.interp.tracing.host_copies import LARGE
from headscope.interp.tracing.piece import Piece

Shape = tuple[int, ...]


class Tower(Protocol):
    """Which layers of a model are recorded."""

    model: ModelLike
    tower: str | None
    layers: frozenset[int] | None


class Rooms:
    """Arrays (example, layer, ...) by the name of the variable that is to be written there, each given out once."""

    def __init__(self) -> None:
        self._made: dict[str, Future[NDArray[Any]]] = {}
        self._process = os.getpid()

    def prepare(self, call: AttentionCall, piece: Piece, of: Tower) -> None:
        """Begin to make room for large values like those of ``piece``, of all recorded layers, where a GPU computes.

        A guess: a record with padding at its end, of several passes or of fewer layers takes other arrays.
        """
        if not self.idles(call):
            return
        parts = {name: next(iter(parts.values())) for name, parts in (piece.parts or {}).items() if parts}
        for name, value in {**piece.values.get(ROW, {}), **parts}.items():
            if value.nbytes >= LARGE:
                layers = tower_size(of.model, of.tower).heads if of.layers is None else of.layers
                shape = (value.shape[0], len(layers), *value.shape[1:])
                self._made[name] = _thread().submit(_touched, shape, dtype_of(value))

    def idles(self, call: AttentionCall) -> bool:
        """Whether the host idles while ``call`` is computed."""
        return call.query.is_cuda

    def take(self, name: str, shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of nobody else's: the one that was prepared, where it fits."""
        made = self._made.pop(name, None)
        if made is None or self._process != os.getpid() or made.cancel():  # no thread outlives a fork
            return np.empty(shape, dtype)
        array = made.result()
        return array if array.shape == shape and array.dtype == dtype else np.empty(shape, dtype)

    def clear(self) -> None:
        """Give back what was prepared."""
        self._made.clear()


def dtype_of(value: Tensor) -> np.dtype[Any]:
    """NumPy's type of the numbers of ``value``."""
    found: np.dtype[Any] = value.new_empty(0, device="cpu").numpy().dtype
    return found


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="headscope-rooms")


def _touched(shape: Shape, dtype: np.dtype[Any]) -> NDArray[Any]:
    array: NDArray[Any] = np.empty(shape, dtype)
    torch.from_numpy(array).zero_()  # on torch's threads
    return array
