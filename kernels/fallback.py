"""A kernel that a compiler cannot build is left to the next engine, with a warning, and is not tried again.

Compilers fail on machines that nobody tested: another Triton, another ptxas, no C compiler, too little shared memory.
Hopper's kernels fall to Triton's, those and FlexAttention to streaming, which needs no compiler.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

COMPILERS = ("triton", "torch._dynamo", "torch._inductor")
# what a card says at the next launch of a kernel that ran before: nothing after it can be trusted, nothing is hidden
RAN = ("illegal memory access", "misaligned address", "device-side assert", "launch failure", "illegal instruction")
_FAILED: dict[object, str] = {}  # by call shape: why


class EngineWarning(UserWarning):
    """A slower engine computes a call than the one that was to; the results are the same."""


class NotCompiled(RuntimeError):
    """A kernel could not be built; ``first``: for the first time, with inputs of these types."""

    def __init__(self, cause: str, *, first: bool) -> None:
        super().__init__(cause)
        self.first = first


@contextmanager
def falls_back(engine: str) -> Iterator[None]:
    """The block ends without an error where a kernel in it does not compile: ``engine`` is to compute what it did."""
    try:
        yield
    except NotCompiled as error:
        if error.first:
            warnings.warn(f"{error}; {engine} computes this call, slower", EngineWarning, stacklevel=4)


def build(start: Callable[..., Any], kernel: Any, x: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """``start(*args, **options)``, which builds ``kernel`` and runs it on the device of ``x``; what that gives.

    Raises NotCompiled where it cannot be built; memory that is spent and what Triton's interpreter says stay as they
    are.
    """
    shape = (id(kernel), _types(args), tuple(options.items())) if _FAILED else None
    if shape in _FAILED:
        raise NotCompiled(_FAILED[shape], first=False)
    try:
        return start(*args, **options)
    except Exception as error:
        if not is_compilers(error, x):
            raise
        name = getattr(kernel, "__module__", "").removeprefix("headscope.")
        what = f"{name} does not compile for {str(x.dtype).removeprefix('torch.')} heads {x.shape[-1]} wide"
        cause = f"{what} ({type(error).__name__}: {first_line(error)})"
        _FAILED[(id(kernel), _types(args), tuple(options.items()))] = cause
        raise NotCompiled(cause, first=True) from error


def is_compilers(error: Exception, x: Tensor) -> bool:
    """Whether ``error`` is of building a kernel: what compilers raise, and on a card whatever else is raised in their
    code, but for spent memory and for kernels that failed while they ran."""
    if isinstance(error, torch.OutOfMemoryError) or type(error).__name__ == "InterpreterError":
        return False
    if any(what in str(error) for what in RAN):
        return False
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    raised_in = "" if place is None else str(place.tb_frame.f_globals.get("__name__"))
    ours = raised_in.startswith("headscope.") and type(error).__module__ == "builtins"  # a bug of ours, not theirs
    return (x.is_cuda and not ours) or type(error).__module__.startswith(COMPILERS)


def first_line(error: Exception) -> str:
    """The first line of ``error`` that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip(" `.-=")), "no message")[:200]


def _types(x: Any) -> Any:
    """What a kernel is compiled anew for, more or less: types, and which arguments are None."""
    if isinstance(x, Tensor):
        return x.dtype
    if isinstance(x, tuple):
        return tuple(_types(one) for one in x)
    return (type(x), tuple(x.block_shape)) if hasattr(x, "block_shape") else type(x)
