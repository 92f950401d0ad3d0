"""One attention layer of a TransformerBridge, read from its hook points.

Within a forward pass the last tensor that any query hook showed before the scores is the query that attends, and so
for the key: ``hook_rot_q`` for rotary models, ``hook_q`` for absolute positions and for latent attention (where
``hook_rot_q`` holds only the rotary part), ``hook_q_normed`` where a norm follows the rotation. Joint-QKV rotary layers
(GPT-NeoX) list ``hook_rot_q`` but never fire it: there the bridge's own rotation is applied to what ``hook_q`` showed.
Which keys are visible is read from the bridge's masked scores at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import edit_call, finish_call
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface.dense_masks import rule_of
from headscope.kernels.masks import Mask

HookFunction = Callable[..., Any]
QUERY = ("hook_q", "hook_q_normed", "hook_rot_q")
KEY = ("hook_k", "hook_k_normed", "hook_rot_k")
ROTARY = ("hook_cos", "hook_sin")


@dataclass(frozen=True, eq=False)
class Hook:
    """One function of ours on one hook point. Functions that only read stay behind hooks that the user adds later."""

    point: Any
    function: HookFunction
    stays_last: bool


class Layer:
    """Turns what one layer's hook points show into an AttentionCall, edits it, and hands it to the handlers."""

    def __init__(self, route: Any, attention: Any, prefix: str, hooks: dict[str, Any], module: str, layer: int) -> None:
        self.route, self.attention, self.prefix, self.module, self.layer = route, attention, prefix, module, layer
        functions: dict[str, HookFunction] = {"hook_in": self._begin, "hook_v": self._value}
        functions |= {name: self._query for name in QUERY} | {name: self._key for name in KEY}
        functions |= {name: self._rotary for name in ROTARY}
        functions |= {"hook_attn_scores": self._scores, "hook_pattern": self._pattern, "hook_z": self._z}
        found = {name: hooks[f"{prefix}.{name}"] for name in functions if f"{prefix}.{name}" in hooks}
        self.hooks = [Hook(found[name], functions[name], name not in ("hook_pattern", "hook_z")) for name in found]
        if "hook_pattern" in found:
            self.hooks.append(Hook(found["hook_pattern"], self._seal, True))
        self.fired = 0
        self._forget()

    def _forget(self) -> None:
        self._q: tuple[Tensor, bool] | None = None
        self._k: tuple[Tensor, bool] | None = None
        self._v: tuple[Tensor, bool] | None = None
        self._cached: tuple[Tensor, Tensor, int] | None = None
        self._angles: list[Tensor] = []
        self._visible: Tensor | None = None
        self._call: AttentionCall | None = None
        self._left: Tensor | None = None
        self._own_z = self._foreign = False

    def cached(self, key: Tensor, value: Tensor, key_offset: int) -> None:
        """The cache returned these keys and values (batch, kv_head, key, ·) for this pass."""
        self._cached = (key, value, key_offset)

    def _begin(self, tensor: Tensor, *, hook: Any) -> None:
        self._forget()

    def _query(self, tensor: Tensor, *, hook: Any) -> None:
        self._q, self._angles = (tensor, hook.pos_dim == 2), []

    def _key(self, tensor: Tensor, *, hook: Any) -> None:
        self._k = (tensor, hook.pos_dim == 2)

    def _value(self, tensor: Tensor, *, hook: Any) -> None:
        self._v = (tensor, hook.pos_dim == 2)

    def _rotary(self, tensor: Tensor, *, hook: Any) -> None:
        self._angles.append(tensor)

    def _scores(self, scores: Tensor, *, hook: Any) -> None:
        if self._q is None or scores.dim() != 4:
            return
        heads = slice(None) if len(hook.fwd_hooks) > 1 else slice(0, 1)  # another hook may hide keys from one head
        self._visible = scores[:, heads] > torch.finfo(scores.dtype).min / 2

    def _pattern(self, pattern: Tensor, *, hook: Any) -> Tensor | None:
        if self._visible is None or pattern.dim() != 4:
            raise self.refuse("its hooks do not show the queries and the masked scores before the pattern")
        self.route.check_order(self)
        call = self._make_call(pattern)
        self.fired += 1
        if self.route.check is not None:
            self.route.check.pattern(call, pattern)
        self._call = edited = edit_call(call, self.route.handlers)
        if edited is not call and torch.is_grad_enabled():
            raise HeadscopeError(
                f"an edit inside attention carries no gradient through a TransformerBridge ({self.prefix}), only edits "
                "of head outputs do; give apply(grad=True) the model that load_model or transformers loads"
            )
        self._own_z = edited.value is not call.value
        ours = {own.point: 1 + (own.point is hook) for own in self.hooks if own.function != self._z}
        foreign = any(len(point.fwd_hooks) > count for point, count in ours.items())
        self._foreign = foreign and self.route.check is None and not self._is_ours(call, pattern)
        if self._foreign and edited is not call:
            raise HeadscopeError(_foreign_edit(self.prefix))
        self._left = pattern if edited is call else edited.pattern().to(pattern.dtype)
        return None if edited is call else self._left

    def _seal(self, pattern: Tensor, *, hook: Any) -> None:
        left, self._left = self._left, None
        if left is not None and pattern is not left and not torch.equal(pattern, left):
            self._foreign = True
            if self._own_z:
                raise HeadscopeError(_foreign_edit(self.prefix))

    def _z(self, z: Tensor, *, hook: Any) -> Tensor | None:
        call, own, foreign = self._call, self._own_z, self._foreign
        self._forget()
        if call is None:
            raise self.refuse("it attends natively: hook_pattern fires after the attention or never, and drops edits")
        heads = call.query.shape[1]
        flat = z.reshape(*z.shape[:2], -1)  # the bridge's own split into heads is wrong where d_value != d_head
        if flat.shape[-1] != heads * call.value.shape[-1]:
            raise self.refuse(f"hook_z is {flat.shape[-1]} wide, not {heads} heads of {call.value.shape[-1]}")
        theirs = flat.view(*flat.shape[:2], heads, -1).transpose(1, 2)
        if self.route.check is not None:
            self.route.check.output(call, theirs)
        if foreign:
            call = _Unreadable(**{field.name: getattr(call, field.name) for field in fields(call)})
        before = call.output() if own else theirs
        after = finish_call(call, self.route.handlers, before)
        return None if after is theirs else after.transpose(1, 2).reshape(z.shape)

    def _make_call(self, pattern: Tensor) -> AttentionCall:
        if self._q is None or self._k is None or self._v is None:
            raise self.refuse("it has no hook for the values, or for the queries and keys as they attend")
        self._refuse_dropout()
        heads, queries, keys = pattern.shape[1:]
        query = _by_head(*self._q, heads)
        kv_heads = self._k[0].shape[-1] // query.shape[-1]
        key = _by_head(*self._k, kv_heads)
        value = _by_head(*self._v, key.shape[1])
        if self._angles:
            query, key = self._rotate(query, key)
        clip = getattr(getattr(self.attention.original_component, "config", None), "clip_qkv", None)
        value = value if clip is None else value.clamp(-clip, clip)
        key_offset = 0
        if self._cached is not None:
            key, value, key_offset = self._cached
        if key.shape[2] != keys or value.shape[2] != keys or query.shape[2] != queries:
            raise self.refuse(
                "this pass continues a cache that hooks alone do not show; use `with attached(bridge, ...)`"
            )
        own = self.attention.original_component
        return AttentionCall(
            query=query,
            key=key,
            value=value,
            mask=self._mask(queries, keys, key_offset),
            scale=self._scale(query.shape[-1]),
            layer=self.layer,
            module=self.module,
            softcap=getattr(own, "attn_logit_softcapping", None),
            sinks=getattr(own, "sinks", None),
        )

    def _rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        rotate = getattr(self.attention, "_apply_rotary_pos_emb", None)
        if rotate is None or len(self._angles) != len(ROTARY):
            raise self.refuse("its queries are rotated after the last hook that shows them")
        rotated: tuple[Tensor, Tensor] = rotate(query, key, *self._angles)
        return rotated

    def _scale(self, width: int) -> float:
        own = self.attention.original_component
        config = self.attention.config
        if "qkv" in self.attention.submodules:  # fused projections: the bridge ignores the module's own scaling
            by_layer = getattr(config, "scale_attn_by_inverse_layer_idx", False)
            return float(width**-0.5 / (self.layer + 1 if by_layer else 1))
        scale = getattr(own, "scaling", None)
        scale = getattr(own, "softmax_scale", None) if scale is None else scale
        return float(width**-0.5 if scale is None else scale)

    def _mask(self, queries: int, keys: int, key_offset: int) -> Mask:
        assert self._visible is not None
        state = self.route.state
        if state is not None:
            mask = rule_of(self._visible, query_offset=state.past, key_offset=key_offset, real=state.real)
        elif queries == keys:
            real = self._visible[:, 0].diagonal(dim1=-2, dim2=-1)  # a token sees itself, padding is seen by nobody
            mask = rule_of(self._visible, real=None if bool(real.all()) else real)
        else:
            raise self.refuse(
                "this pass continues a cache that hooks alone do not show; use `with attached(bridge, ...)`"
            )
        shared: Mask = self.route.shared_mask(mask, queries, keys)
        return shared

    def _refuse_dropout(self) -> None:
        own = self.attention.original_component
        if self.attention.training:
            rates = [getattr(own, name, 0.0) for name in ("attention_dropout", "attn_dropout", "dropout")]
            if any(getattr(rate, "p", rate) not in (None, 0, 0.0) for rate in rates):
                raise HeadscopeError("attention dropout is active; call bridge.eval() before tracing or editing")

    def _is_ours(self, call: AttentionCall, pattern: Tensor) -> bool:
        from headscope.interp.sites.transformer_lens.verify import bound_of

        real = call.mask.query_is_real(torch.arange(pattern.shape[2], device=pattern.device))
        difference = (call.pattern() - pattern.float()).abs().amax((1, 3))
        difference = difference if real is None else difference.masked_fill(~real, 0.0)
        return float(difference.max()) <= bound_of(call)

    def refuse(self, why: str) -> HeadscopeError:
        """The error that names this layer, its architecture and its bridge class."""
        model = self.route.model
        kind = getattr(getattr(model, "config", None), "model_type", "?")
        return HeadscopeError(
            f"{self.prefix} of {type(model).__name__} ({kind}, {type(self.attention).__name__}) cannot be traced "
            f"through the bridge: {why}; load the model with load_model or transformers and trace that"
        )


def _foreign_edit(where: str) -> str:
    return (
        f"another hook changes the scores or the pattern of {where}, which statistics from queries and keys or a "
        "headscope edit of attention would miss; make that change as a headscope intervention, or in a run of its own"
    )


class _Unreadable(AttentionCall):
    """A call whose pattern a hook of the user's has changed: its head outputs may be edited, nothing may be read."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise HeadscopeError(_foreign_edit(f"blocks.{self.layer}.attn"))

    attend = pattern = output = _refuse


def _by_head(x: Tensor, heads_first: bool, heads: int) -> Tensor:
    """(batch, head, position, d) of what a hook shows: that, (batch, position, head, d), or the heads in one axis."""
    if x.dim() == 3:
        x = x.view(*x.shape[:2], heads, -1)
    return x if heads_first and x.dim() == 4 else x.transpose(1, 2)
