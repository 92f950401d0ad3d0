"""Settings of an edit in words: in descriptions, in names, and as a paper's appendix prints them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from typing import Any

from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet
from headscope.interp.runs.provenance import describe
from headscope.interventions.files import tensor_hash


def is_default(field: Field[Any], value: Any) -> bool:
    """Whether a field has the value that it has by itself."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return default is value or (type(default) is type(value) and not isinstance(value, Tensor) and default == value)


def described(value: Any) -> Any:
    """A setting as JSON that is equal where its effect is: heads as pairs, tensors by their hash.

    Raises:
        HeadscopeError: an object that cannot be told from another by its contents.
    """
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "type": str(value.dtype), "sha256": tensor_hash(value)}
    if isinstance(value, HeadSet):
        return [list(head) for head in value]
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    return describe(value)


def short(value: Any) -> str:
    """A setting as a paper's appendix prints it."""
    if isinstance(value, Tensor):
        shape, dtype = "x".join(map(str, value.shape)), str(value.dtype).removeprefix("torch.")
        return f"<{shape} {dtype}, sha256 {tensor_hash(value)[:12]}>"
    if isinstance(value, HeadSet):
        return repr(",".join(f"L{layer}H{head}" for layer, head in value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {short(item)}" for key, item in value.items()) + "}"
    return repr(value)


def told(field: Field[Any], value: Any) -> str:
    """A setting in an edit's name."""
    return value if isinstance(value, str) and field.name in ("how", "during") else f"{field.name}={value}"


def listed(names: Sequence[str]) -> str:
    """'a', 'b' or 'c'."""
    return ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"


def check_number(what: str, value: Any) -> None:
    """Raise HeadscopeError, which begins with ``what``, for anything but a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise HeadscopeError(f"{what} must be a number, not {value!r}")
