"""One call of the attention interface of transformers as an AttentionCall, or a refusal where one cannot say it all."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface.masks import LazyMask, from_dense
from headscope.kernels.masks import Mask

# Arguments that choose keys or change weights in ways an AttentionCall cannot say.
_UNKNOWN = ("cache", "indices", "block_indices")
SMALL = 1 << 18  # query-key pairs: a decoding step over 262,144 keys, a prompt of 512 tokens


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
    mask, bias = _mask_of(module, query, key, attention_mask, kwargs, cross)
    given = kwargs.get("position_bias")
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        layer=place.layer,
        module=place.module,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        position_bias=given if bias is None else bias if given is None else given + bias,
        cross=cross,
        gaps=isinstance(attention_mask, LazyMask) and attention_mask.gaps,
        dense=attention_mask is not None and not isinstance(attention_mask, LazyMask),
    )


def _mask_of(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any], cross: bool
) -> tuple[Mask, Tensor | None]:
    """The rule of a call's mask, and what a dense additive mask adds beside hiding."""
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(mask, LazyMask):
        if mask.shape[-1] != keys:
            raise HeadscopeError(
                f"this model attends over {keys} keys under a mask made for {mask.shape[-1]}; it cannot be traced as "
                "masks-by-rule; please report the architecture"
            )
        return (_of_keys_only(mask.rule) if cross else mask.rule), None
    if mask is not None:
        rule, bias = from_dense(mask[..., :keys], queries)
        return (replace(rule, query_offset=0, rule=_shift(rule, queries - keys)) if cross else rule), bias
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    if cross or not causal:
        return Mask.full(), None
    if queries == 1:
        return Mask(query_offset=keys - 1, right=None), None
    return Mask.causal(keys - queries), None


def _shift(mask: Mask, by: int) -> Any:
    rule = mask.rule
    assert rule is not None
    return lambda b, h, q, k: rule(b, h, q - by, k)


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


def leave(
    module: nn.Module,
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Tensor | None:
    """What the model's own attention function gives on its own mask: for a layer that nobody reads or changes.

    None for the implementations and sizes where our attention is at least as good: the mask or the scores would be a
    large (query, key) tensor, and beside that many the few microseconds that our bookkeeping takes do not show.
    """
    lazy = isinstance(attention_mask, LazyMask)
    if implementation not in ("sdpa", "eager") or not (lazy or attention_mask is None):
        return None
    if query.shape[0] * query.shape[2] * key.shape[2] > SMALL:
        return None
    mask = attention_mask.original(implementation) if lazy else None  # type: ignore[union-attr]
    result: Tensor = original_function(module, implementation)(module, query, key, value, mask, **kwargs)[0]
    return result


def original_function(module: nn.Module, name: str) -> Any:
    """The attention function that ``module`` would call under implementation ``name``.

    Raises:
        HeadscopeError: there is none.
    """
    kind: Any = type(module)
    function = None if name == "eager" else ALL_ATTENTION_FUNCTIONS.get(name)
    if function is None:
        namespace, own = _own_eager(kind)
        function = namespace.get(own)
    if function is None:
        raise HeadscopeError(f"{type(module).__name__} has no attention function {name!r} to compare with")
    return function


@cache
def _own_eager(owner: Any) -> tuple[dict[str, Any], str]:
    """The namespace and name of the eager function that the module's forward names; modeling files may hold several."""
    for kind in owner.__mro__:
        namespace = vars(sys.modules[kind.__module__])
        code = getattr(vars(kind).get("forward"), "__code__", None)
        named = [name for name in (code.co_names if code else ()) if "eager" in name and name in namespace]
        for name in (*named, "eager_attention_forward"):
            if name in namespace:
                return namespace, name
    return {}, ""
