"""The residual stream of a Hugging Face model shown to a handler, to read and to edit, at the places it names.

Hooks are on the model only while the handler is attached. An edit of ``resid_mid``, which no module gives, is made in
what attention adds to the stream.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.attention.stream import NEURONS, PLACES, StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.attachment import Attachment
from headscope.interp.sites.given import ModelLike, PreTrained
from headscope.interp.sites.huggingface.parallel import require_whole_places
from headscope.interp.sites.huggingface.route import is_paused
from headscope.interp.sites.layout import StreamLayer, output_of, stream_layers, stream_of
from headscope.interp.sites.neurons import down_projection
from headscope.interp.sites.towers import TOWERS, tower_of
from headscope.interp.sites.unwrap import bare_model, origin

_WRITES = ("attn_out", "cross_attn_out", "mlp_out")


@contextmanager
def streaming(model: ModelLike, attachment: Attachment) -> Iterator[None]:
    """Show the attachment's handler the places in its ``streams`` inside the block.

    Raises:
        HeadscopeError: no such place, a place that this architecture does not have (what its layers write does not add
            up to the stream, or their neurons are not known), or a TransformerBridge.
    """
    places = attachment.inner.streams
    if not places:
        yield
        return
    unknown = [place for place in places if place not in PLACES + NEURONS]
    if unknown:
        known = ", ".join(PLACES + NEURONS)
        raise HeadscopeError(f"no place {unknown[0]!r} in the residual stream: name one of ({known})")
    if origin(model) == "transformer_lens":
        own = {"mlp_post": "mlp.out.hook_in", "mlp_down": "mlp.out.hook_out"}.get(places[0], f"hook_{places[0]}")
        raise HeadscopeError(
            f"a TransformerBridge has hook points of its own for the stream (blocks.0.{own}); use those, or "
            "give the model that load_model or transformers loads"
        )
    inner = bare_model(model)
    require_whole_places(inner, places)
    layers = [
        layer
        for layer in stream_layers(inner, attachment.size.tower)
        if attachment.layers is None or layer.layer in attachment.layers
    ]
    for layer in layers:
        _check(layer, places, inner)
    stream = _Stream(inner, attachment, places)
    with ExitStack() as stack:
        stream.follow_passes(layers, stack)
        for layer in layers:
            stream.hook(layer, stack)
        yield


def _check(layer: StreamLayer, places: tuple[str, ...], model: nn.Module) -> None:
    for place in places:
        if place in NEURONS:
            continue  # ``down_projection`` says where there are none
        there = place in layer.writers if place in _WRITES else place != "resid_mid" or layer.in_turn
        if not there:
            raise HeadscopeError(
                f"{type(model).__name__} has no {place!r} in layer {layer.layer}: what its modules give does not add "
                "up to its stream with one (a norm or a factor on the way, parts added at once, or no such part); use "
                "resid_pre or resid_post, or other layers"
            )


class _Stream:
    """The hooks of one handler, and where the tokens of the pass that runs stand."""

    def __init__(self, model: PreTrained, attachment: Attachment, places: tuple[str, ...]) -> None:
        self.model, self.attachment, self.places = model, attachment, places
        self.kind = _kind(model, attachment.size.tower)
        self.padding: Tensor | None = None
        self.hidden = False  # a mask was given that does not say where examples begin
        self.offset = 0
        self._depth = 1 << 16  # how deep the module is that a pass was last seen in
        self._entered: dict[int, Tensor] = {}

    def follow_passes(self, layers: list[StreamLayer], stack: ExitStack) -> None:
        """See the padding and the cache that every module around the layers is given, the innermost's last."""
        if not layers or self.kind in ("vision", "audio", "connector"):
            return  # images and sound come without padding and caches
        name = next(name for name, part in self.model.named_modules() if part is layers[0].module)
        parts = name.split(".")
        for depth in range(len(parts)):

            def begin(module: nn.Module, args: Any, kwargs: Any, depth: int = depth) -> None:
                self._begin(module, args, kwargs, depth)

            around = self.model.get_submodule(".".join(parts[:depth]))
            stack.callback(around.register_forward_pre_hook(begin, with_kwargs=True).remove)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], depth: int) -> None:
        try:
            given = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
        except TypeError:
            given = {}
        given = {**given.pop("kwargs", {}), **given, **kwargs}
        begins = depth <= self._depth
        if begins:
            self.padding, self.hidden, self.offset = None, False, 0
        takes = "decoder_attention_mask" in inspect.signature(module.forward).parameters
        mask = given.get("decoder_attention_mask" if takes and self.kind != "encoder" else "attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.padding, self.hidden = mask.bool(), False
        elif mask is not None and begins:
            self.hidden = True
        cache: Any = given.get("past_key_values")
        if hasattr(cache, "get_seq_length"):
            self.offset = int(cache.get_seq_length())
        self._depth = depth

    def hook(self, layer: StreamLayer, stack: ExitStack) -> None:
        """Put one layer's hooks on, in the order in which the stream passes them."""

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = stream_of(args, kwargs)
            if is_paused(self.model) or x is None:
                return None
            new = self.show("resid_pre", layer, x)
            self._entered[layer.layer] = new
            if new is x:
                return None
            return tuple(new if y is x else y for y in args), {k: new if y is x else y for k, y in kwargs.items()}

        def leave(_: nn.Module, args: Any, output: Any) -> Any:
            return self._changed(output, lambda x: self.show("resid_post", layer, x))

        stack.callback(layer.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        if any(place in NEURONS for place in self.places):
            self._hook_neurons(layer, stack)
        for place, writer in layer.writers.items():

            def write(_: nn.Module, args: Any, output: Any, place: str = place) -> Any:
                return self._changed(output, lambda x: self._written(place, layer, x))

            stack.callback(writer.register_forward_hook(write).remove)
        stack.callback(layer.module.register_forward_hook(leave).remove)
        stack.callback(self._entered.clear)

    def _hook_neurons(self, layer: StreamLayer, stack: ExitStack) -> None:
        projection = down_projection(layer, self.model)

        def take(_: nn.Module, args: tuple[Any, ...]) -> Any:
            x = stream_of(args, {})
            if x is None:
                raise HeadscopeError(
                    f"the MLP of layer {layer.layer} of {type(self.model).__name__} does not take tokens as (batch, "
                    "position, ...), so its neurons are not known: edit mlp_out of the residual stream"
                )
            new = x if is_paused(self.model) else self.show("mlp_post", layer, x)
            return None if new is x else (new, *args[1:])

        def give(_: nn.Module, args: Any, output: Any) -> Any:
            return self._changed(output, lambda x: self.show("mlp_down", layer, x))

        stack.callback(projection.register_forward_pre_hook(take).remove)
        stack.callback(projection.register_forward_hook(give).remove)

    def _written(self, place: str, layer: StreamLayer, x: Tensor) -> Tensor:
        x = self.show(place, layer, x)
        if place != "attn_out" or "resid_mid" not in self.places:
            return x
        before = self._entered[layer.layer]
        stream = before + x
        new = self.show("resid_mid", layer, stream)
        return x if new is stream else new - before

    def _changed(self, output: Any, change: Callable[[Tensor], Tensor]) -> Any:
        x = output_of(output)
        if is_paused(self.model) or x is None:
            return None
        new = change(x)
        if new is x:
            return None
        return new if output is x else type(output)((new, *output[1:]))

    def show(self, place: str, layer: StreamLayer, x: Tensor) -> Tensor:
        """What the handler makes of the stream at one place."""
        if place not in self.places:
            return x
        self.attachment.saw(layer.layer)
        new = self.attachment.inner.stream(StreamCall(place, layer.layer, layer.pattern, x, self.offset, self._where))
        if new.shape != x.shape:
            raise HeadscopeError(
                f"an edit of {place} in layer {layer.layer} was given {tuple(x.shape)} and returned {tuple(new.shape)}"
            )
        return new

    def _where(self, x: Tensor) -> Tensor:
        batch, queries = x.shape[:2]
        at = self.offset + torch.arange(queries, device=x.device).expand(batch, -1)
        if self.hidden:
            raise HeadscopeError("positions are not known under a mask that is no padding; give a 2-D attention_mask")
        if self.padding is None:
            return at
        real = self.padding.to(x.device)
        if real.shape[0] != batch or real.shape[1] < self.offset + queries:
            raise HeadscopeError(
                f"positions are not known: the attention mask is {tuple(real.shape)}, the stream {tuple(x.shape[:2])} "
                f"after {self.offset} positions in a cache"
            )
        start = real.int().argmax(1, keepdim=True)
        return (at - start).masked_fill(~real[:, self.offset : self.offset + queries], -1)


def _kind(model: nn.Module, tower: str) -> str:
    """What a tower reads: an encoder of sound is told from one of text."""
    kind = tower if tower in TOWERS else tower_of(tower, model)
    hears = getattr(model, "main_input_name", "input_ids") != "input_ids"
    return "audio" if kind == "encoder" and hears else kind
