"""One handler on one model: which calls it is shown, and whether the layers that it names attended at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.sizes import attending, tower_size
from headscope.interp.sites.towers import selects, tower_of
from headscope.interp.sites.unwrap import bare_model
from headscope.kernels.request import Reduced, Request

Layers = Iterable[int] | Mapping[int, str]


class Attachment(Handler):
    """Shows ``inner`` the calls of one tower, of ``layers`` alone where they are given, and to ``inner.follow`` those
    of the towers that it follows.

    ``layers`` may map each layer to what an error calls it, such as the heads that are edited there. Where no layer and
    no stream is read or changed (none is named, or every edit has strength 0) it ``rests``: nothing goes on the model,
    which runs what it ran before, compiled graphs too.

    Raises:
        HeadscopeError: no such tower, or a layer that does not attend in it.
    """

    def __init__(
        self, model: ModelLike, inner: Handler, tower: str | None = None, layers: Layers | None = None
    ) -> None:
        self.inner, self._model = inner, bare_model(model)
        self.size = tower_size(model, tower)
        named = None if layers is None else layers if isinstance(layers, Mapping) else dict.fromkeys(layers, "")
        if named is not None:
            self.size.check_layers(named, attend=not inner.streams)
        self.layers = named
        own = ("edit", "request", "edit_output", "observe")
        self._attends = any(getattr(type(inner), name) is not getattr(Handler, name) for name in own)
        self._mine: dict[tuple[str, int], bool] = {}
        self._follows: dict[str, bool] = {}
        self._heads: dict[int, int] = {}
        self._now: set[int] = set()
        self._attended: set[int] = set()
        self._idle: set[int] = set()
        self._passes = 0
        places = [(module, layer) for module, layers in attending(self._model).items() for layer in layers]
        known = bool(places) or named == {}
        self.rests = known and not inner.streams and not any(self.concerns(*place) for place in places)

    @property
    def only_reads(self) -> bool:  # type: ignore[override]
        """As of the handler inside."""
        return self.inner.only_reads

    @classmethod
    def of(cls, model: ModelLike, handler: Handler) -> Attachment:
        """Of a handler that a site is given as it is: its own ``tower`` and ``layers``, or those of its ``heads``."""
        heads = getattr(handler, "heads", None)
        layers = getattr(handler, "layers", None) if heads is None else heads.by_layer()
        return cls(model, handler, getattr(handler, "tower", None), layers)

    def _is_mine(self, module: str, layer: int) -> bool:
        found = self._mine.get((module, layer))  # asked three times a call: found once
        if found is None:
            shown = selects(self.size.tower, module, self._model)
            self._follows[module] = tower_of(module, self._model) in self.inner.follows and not shown
            found = self._mine[module, layer] = shown and (self.layers is None or layer in self.layers)
        return found

    def _check_heads(self, layer: int, heads: int) -> None:
        if self.size.heads.get(layer) != heads:  # what the modules did not say, or said otherwise
            self.inner.check(max(self.size.depth, 1 + layer), heads)
        self._heads[layer] = heads

    def saw(self, layer: int) -> None:
        """Note that the stream of a layer was shown."""
        self._now.add(layer)

    def concerns(self, module: str, layer: int) -> bool:
        mine = self._is_mine(module, layer)
        if mine and not self.inner.concerns(module, layer):  # a strength of 0, say: the layer's own attention runs
            self._idle.add(layer)
            mine = False
        if self.inner.streams:  # which are hooks of their own, so that attention may be left alone
            mine = mine and self._attends
        return mine or self._follows[module]

    def edit(self, call: AttentionCall) -> AttentionCall:
        layer = call.layer
        if not self._is_mine(call.module, layer):
            return call
        heads = call.query.shape[1]
        if self._heads.get(layer) != heads:
            self._check_heads(layer, heads)
        self._now.add(layer)
        return self.inner.edit(call)

    def request(self, call: AttentionCall) -> Request | None:
        if self._is_mine(call.module, call.layer):
            return self.inner.request(call)
        if self._follows[call.module]:
            self.inner.follow(call)
        return None

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        return self.inner.edit_output(call, z) if self._is_mine(call.module, call.layer) else z

    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        self.inner.observe(call, reduced)

    def begin_forward(self, inputs: dict[str, Any]) -> None:
        self.inner.begin_forward(inputs)

    def fill_cache(self, cache: Any) -> None:
        self.inner.fill_cache(cache)

    def end_forward(self) -> None:
        self._passes += 1
        self._attended |= self._now
        self._now.clear()
        self.inner.end_forward()

    def abort_forward(self) -> None:
        self._now.clear()
        self.inner.abort_forward()

    def finish(self) -> None:
        """Refuse a block whose passes finished and left out a layer that was named; else tell the handler.

        Raises:
            HeadscopeError: names the layer, or the heads in it.
        """
        missing = [layer for layer in self.layers or () if layer not in self._attended | self._idle]
        if self._passes and missing and self.layers is not None:
            what = self.layers[missing[0]] or f"layer {missing[0]}"
            raise HeadscopeError(
                f"{what} of {self.size.tower!r} attended in none of the {self._passes} finished forward passes of this "
                "block, so nothing was read or changed there (these inputs do not reach it, or its forward was "
                "replaced): leave it out, or use the model's own attention"
            )
        self.inner.finish()
