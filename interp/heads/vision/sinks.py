"""Sink tokens of a picture, layer by layer, and the masses of the text that looks at it: one pass of one chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.attention.stream import StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.sinking.dimension import EPSILON
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.look import Look, sample_of
from headscope.interp.sites import attached
from headscope.kernels.request import Columns, Reduced, Request

Array = NDArray[np.float64]
Score = Literal["sink_mass", "image_mass", "ratio", "centric"]


@dataclass(frozen=True, eq=False)
class LayerSinks:
    """One layer of one chat: ``phi`` (token,) of its prompt (None: not looked at), ``tau``, ``image`` and ``sinks``
    (token,) bool, ``mass`` and ``on`` (head, row): on the picture and on its sinks, of the rows of text behind it, and
    ``received`` (token,): the mean over those rows and heads."""

    layer: int
    tau: float | None
    phi: Array | None
    image: NDArray[np.bool_]
    sinks: NDArray[np.bool_]
    mass: Array
    on: Array
    received: Array

    def score(self, by: Score, rho: float, least: float) -> Array:
        """(head,)"""
        seen = self.mass > 0
        r = np.where(seen, 1 - self.on / np.where(seen, self.mass, 1), 0.0)
        looks = self.mass >= least
        if by == "ratio":
            counted = (looks & seen).sum(1)
            return np.asarray(np.where(looks, r, 0).sum(1) / np.maximum(counted, 1))
        centric = looks & (r >= rho) & bool(self.sinks.any())
        return np.asarray({"sink_mass": self.on, "image_mass": self.mass, "centric": centric}[by].mean(1))

    def told(self) -> dict[str, Any]:
        """What parts its sinks from other image tokens."""
        rest = self.image & ~self.sinks
        found: dict[str, Any] = {"layer": self.layer, "tau": self.tau, "sinks": np.flatnonzero(self.sinks).tolist()}
        if self.phi is not None and rest.any():
            found["phi_below"] = float(self.phi[rest].max())
        if self.phi is not None and self.sinks.any():
            found["phi_above"] = float(self.phi[self.sinks].min())
            if rest.any():
                found["times"] = float(self.received[self.sinks].mean() / max(self.received[rest].mean(), 1e-12))
        return found


def read_sinks(
    lm: LanguageModel, one: Look, dimensions: Sequence[int], taus: dict[int, float]
) -> dict[int, LayerSinks]:
    """The sinks of a chat's pictures and what its text looks at, layer by layer, in one pass.

    Raises:
        HeadscopeError: no text stands behind the picture; a dimension that the stream lacks; a tau that phi, which is
            at most sqrt(d_model), cannot reach.
    """
    if one.end >= len(one.ids):
        raise HeadscopeError(f"no text stands behind the picture of chat {one.item.name!r}, so nothing looks at it")
    handler = _Sinks(one, dimensions, taus)
    sample = sample_of(lm, 0, one.prompt)
    with one.prompt.published(), attached(lm, handler):
        lm.forward(sample.ids[None], logits=1, cache=False, **sample.inputs)
    return dict(sorted(handler.found.items()))


class _Sinks(Handler):
    """Reads phi where a layer begins, then the masses of the rows behind the picture."""

    streams = ("resid_pre",)
    only_reads = True

    def __init__(self, one: Look, dimensions: Sequence[int], taus: dict[int, float]) -> None:
        self.one, self.dimensions, self.taus = one, list(dimensions), taus
        self.image = torch.zeros(len(one.ids), dtype=torch.bool)
        self.image[torch.from_numpy(one.tokens)] = True
        self.phi: dict[int, Tensor] = {}
        self.found: dict[int, LayerSinks] = {}

    def stream(self, call: StreamCall) -> Tensor:
        """phi of the layers that have a tau."""
        if call.layer in self.taus and self.dimensions:
            width = call.x.shape[-1]
            if max(self.dimensions) >= width or self.taus[call.layer] >= width**0.5:
                raise HeadscopeError(
                    f"dimensions {self.dimensions} with tau={self.taus[call.layer]:g} find no sink in a stream of "
                    f"{width} dimensions, where |x_d| / rms is at most {width**0.5:.3g}: leave both out"
                )
            x = call.x[0].float()
            rms = x.square().mean(-1, keepdim=True).add(EPSILON).sqrt()
            self.phi[call.layer] = (x[:, self.dimensions] / rms).abs().amax(-1)
        return call.x

    def request(self, call: AttentionCall) -> Request:
        """Masses of the rows behind the picture, and what their keys receive."""
        image, count = self.image.to(call.query.device), len(self.image)
        columns = torch.stack([image, image & self._sinks(call.layer, image)], -1)
        behind = (self.one.end, count)
        rows = torch.arange(*behind, device=image.device)
        return Request(linear=columns, query_rows=rows, columns=(Columns(behind, sum=True),))

    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        """Keep them."""
        assert reduced.linear is not None and reduced.columns[0].sum is not None
        mass, on = reduced.linear[0].double().cpu().unbind(-1)
        received = reduced.columns[0].sum[0].double().mean(0).cpu() / mass.shape[1]
        phi, sinks = self.phi.get(call.layer), self._sinks(call.layer, self.image)
        self.found[call.layer] = LayerSinks(
            call.layer,
            self.taus.get(call.layer),
            None if phi is None else phi.double().cpu().numpy(),
            self.image.numpy(),
            (sinks & self.image).numpy(),
            mass.numpy(),
            on.numpy(),
            received.numpy(),
        )

    def _sinks(self, layer: int, image: Tensor) -> Tensor:
        phi = self.phi.get(layer)
        return torch.zeros_like(image) if phi is None else (phi > self.taus[layer]).to(image.device)
