"""Keys found while a prompt is read, kept for the passes that continue it: sinks of every layer, head by head.

A pass that begins at position 0 begins new examples. One that continues must follow the pass before it, on the same
cache; anything else would look up another prompt's keys, and is refused.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.boundary import known_boundary
from headscope.interventions.phases import as_mask, chosen_rows, require_told
from headscope.kernels.request import Columns, Request

Sets = Literal["prompt", "context", "pass"]


@dataclass
class _Layer:
    """``keys`` bool (batch or 1, head or 1, position from the first column) of a layer whose rows up to ``stop`` were
    seen."""

    keys: Tensor
    stop: int


class Found:
    """The keys that an edit found in the prompt, layer by layer."""

    def __init__(self) -> None:
        self._layers: dict[tuple[str, int], _Layer] = {}
        self._cache: weakref.ref[Any] | None = None  # that the layers belong to
        self._now: Any = None  # the cache of the pass that runs
        self.largest = 0.0  # the largest value that was held to a threshold

    def begin(self, inputs: dict[str, Any]) -> None:
        """A pass begins on these inputs."""
        self._now = inputs.get("past_key_values")

    def fill(self, cache: Any) -> None:
        """The pass left its keys in this cache."""
        self._cache, self._now = weakref.ref(cache), None

    def forget(self) -> None:
        """A pass broke off, so that what continues it is unknown."""
        self._layers.clear()
        self._cache = self._now = None

    def follow(self, call: AttentionCall) -> Tensor | None:
        """What is held of the positions before this call; None where it begins new examples.

        Raises:
            HeadscopeError: it continues something else than the pass before.
        """
        place, offset = (call.module, call.layer), call.mask.query_offset
        if offset == 0:
            self._layers.pop(place, None)
            self._cache = None if self._now is None else weakref.ref(self._now)
            return None
        held = self._layers.get(place)
        other = self._now is not None and (self._cache is None or self._cache() is not self._now)
        if held is None or held.stop != offset or other or held.keys.shape[0] not in (1, call.query.shape[0]):
            raise HeadscopeError(
                f"a pass at position {offset} does not continue the prompt that this edit saw last (read before the "
                "block, or another cache): read each prompt inside the block, one after the other"
            )
        return held.keys

    def keep(self, call: AttentionCall, keys: Tensor) -> None:
        """Hold ``keys`` (batch or 1, head or 1, position) with this call's rows as seen."""
        self._layers[call.module, call.layer] = _Layer(keys, call.mask.query_offset + call.query.shape[2])

    def recall(self, call: AttentionCall) -> Tensor:
        """What is held, for the keys of ``call``: bool (batch or 1, head or 1, key); later keys are none."""
        return as_keys(self.whole(call), call)

    def whole(self, call: AttentionCall) -> Tensor:
        """What is held of every position so far: bool (batch or 1, head or 1, position)."""
        return self._layers[call.module, call.layer].keys

    def look(self, call: AttentionCall, threshold: float, sets: Sets, *, first: bool) -> None:
        """Find the sinks of a call that reads a prompt, and hold them.

        m_j = sum_i A[i, j] / (T - j) over T rows, j counted from the example's first token, and sinks are the keys with
        m_j > ``threshold``; without ``first`` the first of them, wherever it is, is left out. The rows are the
        prompt's, all but its last (``"context"``; all of a pass where nobody says which is the last), or all that the
        pass has (``"pass"``).

        Raises:
            HeadscopeError: rows in several passes, cross-attention, or packed sequences.
        """
        if call.cross or call.mask.segments is not None:
            raise HeadscopeError(
                "sinks are found in self-attention of one sequence an example, not in cross-attention or packed "
                "sequences: name other layers, or give each sequence an example of its own"
            )
        held = self.follow(call)
        rows = context_rows(call, sets)
        if held is None:
            require_told(call, "the sinks of an example")
            self.keep(call, self._sinks(call, rows, threshold, first))
            return
        if bool(rows.any()):
            raise HeadscopeError(
                f"sinks are found over all rows of the {sets}, and these come in several passes: read them at once "
                "(sets='context' needs all but the prompt's last row in the first pass)"
            )
        self.keep(call, held)

    def _sinks(self, call: AttentionCall, rows: Tensor, threshold: float, first: bool) -> Tensor:
        """The sinks over ``rows`` (batch or 1, query), which begin at the first: bool (batch, head, position)."""
        batch, count = call.query.shape[0], call.key.shape[2]
        at = torch.arange(rows.shape[1], device=rows.device)
        stops = torch.where(rows, at + 1, 0).amax(1).expand(batch)
        ends = stops if call.mask.end is None else torch.minimum(stops, call.mask.end)
        each = sorted(set(stops.tolist()))
        asked = tuple(Columns((0, stop), sum=True) for stop in each)
        sums = call.attend(Request(output=False, columns=asked)).columns
        received = torch.stack([x.sum for x in sums if x.sum is not None], 1)  # (batch, stop, head, key)
        index = (stops[:, None] == torch.tensor(each, device=stops.device)).int().argmax(1)
        received = received[torch.arange(batch, device=stops.device), index]
        ahead = call.mask.key_offset
        left = (ends[:, None] - ahead - torch.arange(count, device=ends.device))[:, None]  # T - j
        mean = torch.where(left > 0, received / left.clamp(min=1), 0.0)
        sinks = mean > threshold
        later = sinks.cumsum(-1) > 1
        beyond = mean.masked_fill(sinks & ~later, 0.0) if not first else mean
        self.largest = max(self.largest, float(beyond.max()))
        return torch.nn.functional.pad(sinks if first else sinks & later, (ahead, 0))


def as_keys(held: Tensor, call: AttentionCall) -> Tensor:
    """What is held of positions (..., position), for the keys of ``call``: bool (..., key); later keys are none."""
    first, count = call.mask.key_offset, call.key.shape[2]
    keys = torch.zeros(*held.shape[:-1], count, dtype=torch.bool, device=held.device)
    part = held[..., first : first + count]
    keys[..., : part.shape[-1]] = part
    return keys


def context_rows(call: AttentionCall, sets: Sets) -> Tensor:
    """Over which rows sinks are found: bool (batch or 1, query)."""
    if sets == "context" and known_boundary() is not None:
        return ~as_mask(chosen_rows(call, "answer"), call)
    return as_mask(chosen_rows(call, "always" if sets == "pass" else "prefill"), call)
