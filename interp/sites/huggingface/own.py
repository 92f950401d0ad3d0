"""The model's own attention function: which one a module calls, whether ours may stand in for it, and running it."""

from __future__ import annotations

import functools
import os
import sys
from types import FunctionType
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface.masks import LazyMask

SMALL = 1 << 18  # query-key pairs: a decoding step over 262,144 keys, a prompt of 512 tokens
_LIBRARY = os.path.dirname(transformers.__file__) + os.sep


def original_function(module: nn.Module, name: str) -> Any:
    """The attention function that ``module`` would call under implementation ``name``.

    Raises:
        HeadscopeError: there is none.
    """
    kind: Any = type(module)
    namespace, own = _own_eager(kind)
    functions = namespace.get("ALL_ATTENTION_FUNCTIONS")  # a modeling file may have an interface of its own
    functions = functions if isinstance(functions, AttentionInterface) else ALL_ATTENTION_FUNCTIONS
    function = None if name == "eager" else functions.get(name)
    if function is None:
        function = namespace.get(own)
    if function is None:
        raise HeadscopeError(f"{type(module).__name__} has no attention function {name!r} to compare with")
    return function


@functools.cache
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


def is_known(module: nn.Module, name: str) -> bool:
    """Whether what ``module`` calls under implementation ``name`` is plain softmax attention for sure.

    That is so for functions of transformers and of the module's own modeling file. What the user registered, or put in
    the place of one of these (a wrapper that hides keys while decoding, say), may do anything beyond the lengths that a
    check tries, and so may a mask function that is not transformers'.
    """
    mask = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    home = getattr(sys.modules[type(module).__module__], "__file__", None)
    return _is_of(original_function(module, name), home) and (mask is None or _is_of(mask, None))


@functools.lru_cache(maxsize=256)
def _is_of(function: Any, file: str | None) -> bool:
    """Whether the code of ``function`` stands in transformers or in ``file``, whatever name it goes by."""
    if isinstance(function, functools.partial):  # transformers' own for attention kernels of the hub
        return not function.args and set(function.keywords) <= {"implementation"} and _is_of(function.func, file)
    if not isinstance(function, FunctionType):
        return False
    code = function.__code__.co_filename
    return code.startswith(_LIBRARY) or (file is not None and code == file)


def describe(module: nn.Module, name: str) -> str:
    """The function that is not known, by name."""
    function = original_function(module, name)
    named = getattr(function, "__qualname__", type(function).__name__)
    return f"{getattr(function, '__module__', '?')}.{named}"


def refuse(module: nn.Module, name: str, layer: int) -> HeadscopeError:
    """Why a layer that attends through a function that is not known is neither read nor edited inside attention."""
    return HeadscopeError(
        f"layer {layer} attends through {describe(module, name)} (attn_implementation={name!r}), which is not "
        "transformers' own and may be more than softmax attention: switch to 'sdpa' or 'eager', or, if it is no more, "
        f"say so with headscope.interp.sites.verify(model, trust=[{name!r}])"
    )


def leave(
    module: nn.Module,
    implementation: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    known: bool = True,
    **kwargs: Any,
) -> Any:
    """What the model's own attention function gives on its own mask: for a layer that nobody reads or changes.

    None for the implementations and sizes where our attention is at least as good: the mask or the scores would be a
    large (query, key) tensor, and beside that many the few microseconds that our bookkeeping takes do not show. A
    function that is not ``known`` is never left out.
    """
    lazy = isinstance(attention_mask, LazyMask)
    if known:
        if implementation not in ("sdpa", "eager") or not (lazy or attention_mask is None):
            return None
        if query.shape[0] * query.shape[2] * key.shape[2] > SMALL:
            return None
    mask = attention_mask.original(implementation) if lazy else attention_mask  # type: ignore[union-attr]
    return original_function(module, implementation)(module, query, key, value, mask, **kwargs)
