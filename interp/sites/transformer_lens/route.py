"""The TransformerLens site: AttentionCalls from the hook points of a TransformerBridge (live or booted).

The bridge computes attention itself, so statistics come from the queries and keys its hooks show, and nothing of the
size (query, key) is kept. A changed query, key, mask or bias becomes the pattern at ``hook_pattern``, a changed value
or head output replaces ``hook_z``; the bridge carries on with both, and its own caches show them.

Everything is verified once per bridge against its own ``hook_pattern`` and ``hook_z``. Bridges whose attention modules
attend natively (their ``hook_pattern`` fires too late for an edit to count) are traced by the Hugging Face site on the
wrapped model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.agreement import Verification
from headscope.interp.sites.attachment import Attachment
from headscope.interp.sites.huggingface import route as huggingface
from headscope.interp.sites.towers import parse_name
from headscope.interp.sites.transformer_lens.attention import Hook, HookFunction, Layer
from headscope.interp.sites.transformer_lens.bridge import (
    attends_natively,
    boot,
    components,
    require,
    require_bridge,
    watch_cache,
)
from headscope.interp.sites.unwrap import stopped
from headscope.kernels.masks import Mask

ORDER = (
    "put headscope's hooks last in fwd_hooks, once, and leave remove_batch_dim off; or use "
    "`with attached(bridge, handler)` around run_with_hooks"
)
__all__ = ["attached", "boot", "fwd_hooks", "is_attached", "require", "verify", "verify_once"]


@dataclass(frozen=True, eq=False)
class _Pass:
    """What a forward pass was called with: positions already in the cache, and which positions are tokens."""

    past: int
    real: Tensor | None


class Route:
    """One bridge with our hooks on it: its layers and the handlers in order of entry."""

    def __init__(self, bridge: Any, handlers: list[Handler], *, check: Any = None, standalone: bool = False) -> None:
        self.bridge, self.model, self.handlers, self.check = bridge, bridge.original_model, handlers, check
        self.standalone = standalone
        self.state: _Pass | None = None
        self._inside: nn.Module | None = None
        self._masks: dict[Any, Mask] = {}
        self.layers = _layers(self, bridge)
        self._added: dict[Hook, Any] = {}
        self._torch_hooks: list[Any] = []

    def open(self) -> None:
        """Put the hooks on the bridge."""
        self._add()
        for part in {id(m): m for m in (self.model, getattr(self.model, "base_model", self.model))}.values():
            self._torch_hooks.append(part.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._torch_hooks.append(part.register_forward_hook(self._end, always_call=True))
        for layer in self.layers:
            watch = partial(watch_cache, layer)
            self._torch_hooks.append(layer.attention.register_forward_pre_hook(watch, with_kwargs=True))

    def close(self) -> None:
        """Take them off."""
        for hook in list(self._added):
            self._remove(hook)
        for handle in self._torch_hooks:
            handle.remove()
        self._torch_hooks.clear()

    def _add(self) -> None:
        for layer in self.layers:
            for hook in layer.hooks:
                self._added[hook] = hook.point.add_hook(hook.function, is_permanent=True)

    def _remove(self, hook: Hook) -> None:
        handle = self._added.pop(hook)
        handle.hook.remove()
        hook.point.fwd_hooks[:] = [other for other in hook.point.fwd_hooks if other is not handle]

    def _put_last(self) -> None:
        """Read behind the hooks that were added since, and put back what a reset took away."""
        for hook, handle in list(self._added.items()):
            held = hook.point.fwd_hooks
            if handle not in held or (hook.stays_last and held[-1] is not handle):
                self._remove(hook)
                self._added[hook] = hook.point.add_hook(hook.function, is_permanent=True)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inside is not None and model is not self.model:  # the base model within the whole one
            return
        self._put_last()
        inputs = dict(kwargs)
        if args and "input_ids" not in inputs:
            inputs["input_ids"] = args[0]
        cache, padding = inputs.get("past_key_values"), inputs.get("attention_mask")
        real = padding.bool() if isinstance(padding, Tensor) and padding.dim() == 2 else None
        self.state = _Pass(0 if cache is None else int(cache.get_seq_length()), real)
        self.begin(inputs, model)

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._inside is not model:
            return
        self.state = None
        self.end(completed=output is not None or stopped())  # torch calls the hook also after an exception

    def begin(self, inputs: dict[str, Any], inside: nn.Module) -> None:
        """Tell the handlers that a forward pass of ``inside`` begins, and first if the last one never ended."""
        if self._inside is not None:
            self.end(completed=False)
        self._inside = inside
        for handler in self.handlers:
            handler.begin_forward(inputs)

    def end(self, *, completed: bool) -> None:
        """Tell the handlers that the pass ended, or that it broke off."""
        self._inside = None
        self._masks.clear()
        for handler in self.handlers:
            if completed:
                handler.end_forward()
            else:
                handler.abort_forward()

    def check_order(self, layer: Layer) -> None:
        """Refuse a ``run_with_hooks`` whose later hooks would change what ours have read."""
        if not self.standalone:
            return
        for hook in layer.hooks:
            held = hook.point.fwd_hooks
            if hook.stays_last and (not held or held[-1].user_hook != hook.function):
                raise HeadscopeError(ORDER)

    def shared_mask(self, mask: Mask, queries: int, keys: int) -> Mask:
        """One Mask object for all layers of a pass that say the same, so that what is planned once serves them all."""
        if mask.rule is not None:
            return mask
        key = (queries, keys, mask.query_offset, mask.key_offset, mask.left, mask.right)
        return self._masks.setdefault(key, mask)


_ROUTES: WeakKeyDictionary[Any, Route] = WeakKeyDictionary()
_VERIFIED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


@contextmanager
def attached(bridge: Any, handler: Handler) -> Iterator[Any]:
    """Have ``handler`` see every attention call of a TransformerBridge's language layers.

    Contexts nest and compose with the bridge's own hooks, ``run_with_hooks`` and ``run_with_cache``; the last one to
    leave takes everything off again.

    Raises:
        HeadscopeError: not a bridge, or an architecture that the bridge does not show exactly; the message names it.
    """
    require_bridge(bridge)
    if attends_natively(bridge):
        with huggingface.attached(bridge.original_model, handler) as inner:
            yield inner
        return
    route = _ROUTES.get(bridge)
    if route is None:
        route = Route(bridge, [])
        try:
            route.open()
        except BaseException:
            route.close()
            raise
        _ROUTES[bridge] = route
    route.handlers.append(handler)
    try:
        yield route
    finally:
        route.handlers.remove(handler)
        if not route.handlers:
            _ROUTES.pop(bridge, None)
            route.close()


def fwd_hooks(bridge: Any, *handlers: Handler) -> list[tuple[str, HookFunction]]:
    """``handlers`` (a Tracer, interventions) as a ``fwd_hooks`` list for ``bridge.run_with_hooks`` or ``bridge.hooks``.

    Whole prompts only: a pass that continues a cache is refused, one that breaks off or stops at a layer leaves nothing
    in a record. Padding is read from the bridge's masked scores. Put the list after hooks of your own, and make one
    call for all handlers.

    Raises:
        HeadscopeError: not a bridge, or an architecture that the bridge does not show exactly.
    """
    require_bridge(bridge)
    if attends_natively(bridge):
        raise HeadscopeError(
            f"{type(bridge.original_model).__name__} attends natively in this bridge, where hooks cannot edit; use "
            "`with trace(bridge, ...)` or `with apply(bridge, ...)`"
        )
    verify_once(bridge)
    route = Route(bridge, [Attachment.of(bridge, handler) for handler in handlers], standalone=True)

    def begin(tokens: Tensor, hook: Any) -> None:
        if begin not in [held.user_hook for held in hook.fwd_hooks]:
            raise HeadscopeError(ORDER)
        route.begin({"input_ids": tokens}, bridge.original_model)

    def end(logits: Tensor, *, hook: Any) -> None:
        route.end(completed=True)

    ours = [(hook.point.name, hook.function) for layer in route.layers for hook in layer.hooks]
    bounds: dict[str, HookFunction] = {"embed.hook_in": begin, "unembed.hook_out": end}
    if set(bounds) - set(bridge.hook_dict):
        raise HeadscopeError(
            f"{type(bridge.original_model).__name__}'s bridge does not show where a pass begins and ends; use "
            "`with trace(bridge, ...)` or `with apply(bridge, ...)`"
        )
    first, last = bounds.items()
    return [first, *ours, last]


def is_attached(bridge: Any) -> bool:
    """Whether anything of ours is on the bridge now."""
    return bridge in _ROUTES or huggingface.is_attached(bridge.original_model)


def verify_once(bridge: Any) -> Any:
    """Verify a bridge the first time it is seen; afterwards return what was found (``verify.Verification``).

    Raises:
        HeadscopeError: a layer's hooks do not show what it computes; the message names it.
    """
    if bridge not in _VERIFIED:
        found = verify(bridge)
        if not found.passed:
            why = found.problems[0] if found.problems else "no attention layer was called"
            raise HeadscopeError(
                f"{type(bridge.original_model).__name__} cannot be traced exactly through its bridge: {why}; load it "
                "with load_model or transformers and trace that"
            )
        _VERIFIED[bridge] = found
    return _VERIFIED[bridge]


def verify(bridge: Any, inputs: dict[str, Tensor] | None = None) -> Any:
    """Compare pattern and z with ``hook_pattern`` and ``hook_z`` (default: a small padded batch of random tokens)."""
    from headscope.interp.sites.huggingface import verify as hf_verify
    from headscope.interp.sites.huggingface.prompt import prompt
    from headscope.interp.sites.transformer_lens.verify import Check, judge_layers

    require_bridge(bridge)
    model = bridge.original_model
    if attends_natively(bridge):
        return hf_verify.verify_once(model) if inputs is None else hf_verify.verify(model, inputs)
    if bridge in _ROUTES:
        return Verification(calls=1)  # verified when the first handler was attached
    route = Route(bridge, [], check=Check())
    training = [(module, module.training) for module in model.modules()]
    try:
        route.open()
        with torch.no_grad():
            model.eval()
            model(**(prompt(model) if inputs is None else inputs))
    finally:
        route.close()
        for module, was in training:
            module.training = was
    return judge_layers(route.check, route.layers)


def _layers(route: Route, bridge: Any) -> list[Layer]:
    hooks = bridge.hook_dict
    layers = []
    for path, module in components(bridge):
        prefix = str(module.hook_pattern.name).removesuffix(".hook_pattern")
        where, _ = parse_name(path, module)
        match = re.match(r"blocks\.(\d+)\.", prefix)
        layers.append(Layer(route, module, prefix, hooks, where, int(match[1]) if match else 0))
    return layers
