"""Head discovery: one method a file, ``heads.NAME(lm, ...) -> HeadScores``, named in ``METHODS``.

Importing this package is cheap: a method's file, and torch with it, is imported when the method is first used. A
method's name in this package is always its function; ``from headscope.interp.heads.NAME import ...`` reaches its file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from headscope.interp.errors import HeadscopeError

if TYPE_CHECKING:
    from headscope.interp.heads.lookup.duplicate_token import duplicate_token as duplicate_token
    from headscope.interp.heads.lookup.induction import induction as induction
    from headscope.interp.heads.lookup.previous_token import previous_token as previous_token
    from headscope.interp.heads.recall.retrieval import retrieval as retrieval
    from headscope.interp.heads.sinking.alpha import sinks as sinks

# A method's name (on the command line, in result files, as a function) -> the module that defines that function.
METHODS: dict[str, str] = {
    "sinks": "headscope.interp.heads.sinking.alpha",
    "induction": "headscope.interp.heads.lookup.induction",
    "previous_token": "headscope.interp.heads.lookup.previous_token",
    "duplicate_token": "headscope.interp.heads.lookup.duplicate_token",
    "retrieval": "headscope.interp.heads.recall.retrieval",
}

__all__ = ["METHODS", "duplicate_token", "induction", "method", "previous_token", "retrieval", "sinks"]


def method(name: str) -> Callable[..., Any]:
    """The function of a discovery method by its name; a hyphen may stand for an underscore.

    Raises:
        HeadscopeError: there is no method of that name.
    """
    key = name.replace("-", "_")
    if key not in METHODS:
        raise HeadscopeError(f"there is no discovery method {name!r}; choose one of {', '.join(METHODS)}")
    function: Callable[..., Any] = getattr(import_module(METHODS[key]), key)
    return function


class _Package(ModuleType):
    # Importing a submodule sets it on its package; a method's file must not hide the method of the same name.
    def __setattr__(self, name: str, value: Any) -> None:
        if name in METHODS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in METHODS:
        return method(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *METHODS})
