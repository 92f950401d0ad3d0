"""Numbers in registers and places in memory, for ``emulator``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Value:
    """Numbers in registers. Layouts are ignored: every group holds its numbers whole."""

    type = SimpleNamespace(layout=None)

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.shape, self.dtype = list(x.shape), x.dtype

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.x.contiguous().view(dtype) if bitcast else self.x.to(dtype))

    def permute(self, order: list[int]) -> Value:
        return Value(self.x.permute(order))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.x.reshape(shape))

    def __getitem__(self, at: Any) -> Value:
        return Value(self.x[at])

    def __invert__(self) -> Value:
        return Value(~self.x)

    def __neg__(self) -> Value:
        return Value(-self.x)

    def __bool__(self) -> bool:
        return bool(self.x)

    def __index__(self) -> int:
        return int(self.x)

    __hash__ = None  # type: ignore[assignment]


ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


def _operator(name: str) -> None:
    function = getattr(operator, f"{name}_" if name in ("and", "or") else name)

    def forward(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return Value(function(self.x, plain(other)))

    setattr(Value, f"__{name}__", forward)
    if name in ARITHMETIC:
        setattr(Value, f"__r{name}__", lambda self, other: Value(function(plain(other), self.x)))


for _name in (*ARITHMETIC, *COMPARISONS):
    _operator(_name)


def plain(x: Any) -> Any:
    """What torch computes with."""
    return x.x if isinstance(x, Value) else x


class Pointer:
    """A place, or many, in a tensor."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, plain(step) + self.offset)

    __radd__ = __add__

    def to(self, dtype: torch.dtype) -> Value:
        """The address, in bytes from the tensor's first number."""
        return Value((torch.as_tensor(self.offset) * self.memory.element_size()).to(dtype))


def where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Pointer):
        return Pointer(a.memory, torch.where(plain(condition), torch.as_tensor(a.offset), torch.as_tensor(b.offset)))
    return lift(torch.where)(condition, a, b)


def load(at: Pointer, mask: Any = None, other: Any = 0) -> Value:
    index = torch.as_tensor(at.offset)
    seen = torch.ones_like(index, dtype=torch.bool) if mask is None else plain(mask).expand(index.shape)
    found = at.memory.reshape(-1)[torch.where(seen, index, 0)]
    return Value(torch.where(seen, found, torch.as_tensor(other, dtype=found.dtype)))


def store(at: Pointer, values: Value, mask: Any = None) -> None:
    index = torch.as_tensor(at.offset)
    seen = torch.ones_like(index, dtype=torch.bool) if mask is None else plain(mask).expand(index.shape)
    memory = at.memory.view(-1)
    memory[index[seen]] = values.x.expand(index.shape)[seen].to(memory.dtype)


def lift(function: Callable[..., Tensor]) -> Callable[..., Value]:
    def call(*args: Any, **options: Any) -> Value:
        return Value(function(*(torch.as_tensor(plain(x)) for x in args), **options))

    return call
