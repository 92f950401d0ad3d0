"""One call of the attention interface of transformers as an AttentionCall, or a refusal where one cannot say it all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface.dense_masks import Dense
from headscope.interp.sites.huggingface.masks import LazyMask
from headscope.kernels.masks import Mask

# Arguments that choose keys or change weights in ways an AttentionCall cannot say.
_UNKNOWN = ("cache", "indices", "block_indices")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refusal(model: nn.Module, why: str) -> str:
    """The one-line refusal of an architecture."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return (
        f"{type(model).__name__} ({kind}) is refused: {why}. A trace of it would be empty or wrong; use a model whose "
        "attention goes through transformers' attention interface"
    )


def make_call(
    module: nn.Module,
    place: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> AttentionCall:
    """The AttentionCall of one call of transformers' interface.

    Raises:
        HeadscopeError: dropout is active, or an argument changes attention in a way that is not supported.
    """
    if dropout:
        raise HeadscopeError("attention dropout is active; call model.eval() before tracing or editing")
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise HeadscopeError(refusal(place.route.model, f"its attention takes {name!r}, which is not supported"))
    cross = place.tower in ("cross", "connector")
    lazy = isinstance(attention_mask, LazyMask)
    found = _mask_of(module, place, query, key, attention_mask, kwargs, cross)
    given, bias = kwargs.get("position_bias"), found.bias
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=found.mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        layer=place.layer,
        module=place.module,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        position_bias=given if bias is None else bias if given is None else given + bias,
        cross=cross,
        gaps=found.gaps,
        dense=attention_mask is not None and not lazy,
    )


def _mask_of(
    module: nn.Module,
    place: Any,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
    cross: bool,
) -> Dense:
    """The rule of a call's mask, and what a dense additive mask adds beside hiding."""
    queries, keys = query.shape[2], key.shape[2]
    eager = place.implementation == "eager"
    if isinstance(mask, LazyMask):
        causal = queries > 1 and not cross and _is_causal(module, kwargs, eager)
        asked = (place.implementation, place.tower, causal, queries, keys)
        if asked not in mask.read:  # once for all layers
            mask.read[asked] = Dense(_of_lazy(mask, place, queries, keys, causal, cross), None, mask.gaps)
        read: Dense = mask.read[asked]
        return read
    if mask is not None:
        made: Dense = place.route.dense.of(mask, query, keys, eager=eager, cross=cross)
        return made
    if cross or not _is_causal(module, kwargs, eager):
        return Dense(Mask.full() if cross else _continuing(Mask.full(), place, queries, keys))
    if queries == 1:
        return Dense(Mask(query_offset=keys - 1, right=None))
    return Dense(Mask.causal(keys - queries))


def _of_lazy(mask: LazyMask, place: Any, queries: int, keys: int, causal: bool, cross: bool) -> Mask:
    """The rule of a mask that was made as a rule, as the function of ``place`` would have attended under it."""
    if mask.shape[-1] != keys:
        raise HeadscopeError(
            f"this model attends over {keys} keys under a mask made for {mask.shape[-1]}; it cannot be traced as "
            "masks-by-rule; please report the architecture"
        )
    if cross:
        return _of_keys_only(mask.rule)
    if queries > 1 and mask.is_left_out(place.implementation):
        return mask.by_causality(causal)
    return _continuing(mask.rule, place, queries, keys)


def _continuing(rule: Mask, place: Any, queries: int, keys: int) -> Mask:
    """The rule of a pass that continues a cache in a model that sees both ways: transformers counts its queries from 0,
    where nothing depends on it, but they stand at the end of the keys."""
    if rule.query_offset or rule.key_offset or queries >= keys or place.tower not in ("language", "decoder"):
        return rule
    if any(getattr(rule, name) is not None for name in ("left", "right", "chunk", "segments", "rule")):
        return rule
    return replace(rule, query_offset=keys - queries)


def _is_causal(module: nn.Module, kwargs: dict[str, Any], eager: bool) -> bool:
    """Whether a function that gets no mask attends causally: eager code never does, the others go by this flag."""
    causal = kwargs.get("is_causal")
    return not eager and bool(getattr(module, "is_causal", False) if causal is None else causal)


def _of_keys_only(mask: Mask) -> Mask:
    """Padding of the other sequence: it hides keys, and says nothing of queries."""
    start, end, earlier = mask.start, mask.end, mask.rule
    if start is None and end is None:
        return mask

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = k == k if start is None else k >= start[b]
        seen = seen if end is None else seen & (k < end[b])
        return seen if earlier is None else seen & earlier(b, h, q, k)

    batch = (start if end is None else end).shape[0]  # type: ignore[union-attr]
    return replace(mask, start=None, end=None, rule=rule, examples=batch)


def from_first_key(call: AttentionCall, mask: Tensor | None) -> AttentionCall:
    """``call`` across two sequences with the other sequence's left padding moved behind it, so that positions of keys
    count from its first token; nothing there depends on the order of keys.
    """
    start = _first_key(mask) if call.cross else None
    if start is None or not bool((start > 0).any()):
        return call
    batch, heads, keys, width = call.key.shape
    index = (torch.arange(keys, device=call.key.device) + start[:, None]) % keys  # (batch, key)
    index = index.expand(batch, -1)
    rule, bias = call.mask.rule, call.position_bias

    def moved(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert rule is not None
        return rule(b, h, q, index[b, k])

    def gathered(x: Tensor) -> Tensor:
        return x.gather(2, index[:, None, :, None].expand(batch, heads, keys, x.shape[-1]))

    if bias is not None:
        bias = bias.expand(batch, -1, -1, -1)
        bias = bias.gather(3, index[:, None, None, :].expand(bias.shape))
    changed = call.mask if rule is None else replace(call.mask, rule=moved, examples=batch)
    return call.with_(key=gathered(call.key), value=gathered(call.value), mask=changed, position_bias=bias)


def _first_key(mask: Tensor | None) -> Tensor | None:
    """Where each example's keys begin (batch,), None where none is padded on the left."""
    if isinstance(mask, LazyMask):
        return mask.rule.start
    if mask is None or mask.dtype not in (torch.bool, *_FLOATS):
        return None
    seen = mask if mask.dtype == torch.bool else mask >= torch.finfo(mask.dtype).min / 2
    return seen.any(1).any(1).int().argmax(-1)
