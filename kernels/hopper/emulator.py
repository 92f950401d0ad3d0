"""Gluon kernels for Hopper run as Python on the CPU: a thread for each group of warps, with the card's barriers.

It knows what the kernels here use, and holds them to what a card does to those who break its rules. Shared memory
begins as NaN; a tile comes when its barrier is waited for, not before; a product is computed where it is waited for, of
what lies in shared memory by then; one that is not waited for cannot be used; and groups that all wait for each other
are an error. What it cannot see: a missing fence, numbers that wrap around in int32, registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from headscope.kernels.hopper.emulated_block import (
    MBARRIER,
    Block,
    Descriptor,
    allocate_shared_memory,
    fetch,
    here,
    this_block,
    warp_specialize,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from headscope.kernels.hopper.emulated_values import Pointer, Value, lift, load, plain, store, where


def _reduced(function: Callable[[Tensor, int], Tensor]) -> Callable[[Any, int], Value]:
    return lambda x, axis: Value(function(plain(x), axis))


def _nothing(*_: Any, **__: Any) -> None:
    return None


LANGUAGE = SimpleNamespace(
    int32=torch.int32,
    int64=torch.int64,
    float32=torch.float32,
    static_range=range,
    cdiv=lambda a, b: -(-a // b),
    program_id=lambda axis: Value(torch.tensor(this_block().program)),
    arange=lambda a, b, layout=None: Value(torch.arange(a, b, dtype=torch.int32)),
    zeros=lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype)),
    zeros_like=lift(torch.zeros_like),
    full=lambda shape, x, dtype, layout=None: Value(torch.full(shape, x, dtype=dtype)),
    where=where,
    minimum=lift(torch.minimum),
    maximum=lift(torch.maximum),
    abs=lift(torch.abs),
    exp2=lift(torch.exp2),
    log2=lift(torch.log2),
    sqrt=lift(torch.sqrt),
    sum=_reduced(lambda x, axis: x.sum(axis)),
    max=_reduced(lambda x, axis: x.amax(axis)),
    convert_layout=lambda x, layout: x,
    split=lambda x: tuple(Value(part) for part in x.x.unbind(-1)),
    load=load,
    store=store,
    allocate_shared_memory=allocate_shared_memory,
    warp_specialize=warp_specialize,
    SliceLayout=_nothing,
    DotOperandLayout=_nothing,
    NVMMADistributedLayout=_nothing,
    NVMMASharedLayout=_nothing,
)
NAMES = {
    "gl": LANGUAGE,
    "tl": LANGUAGE,
    "mbarrier": MBARRIER,
    "fetch": fetch,
    "logarithm": lift(torch.log2),
    "reciprocal": lambda x: 1.0 / x,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "fence_async_shared": _nothing,
}


class Translated(dict[str, Any]):
    """A module's names as the emulated functions see them."""

    def __init__(self, names: dict[str, Any], known: dict[int, Translated]) -> None:
        super().__init__(names)
        known[id(names)] = self
        for name, x in names.items():
            if name in NAMES:
                self[name] = NAMES[name]
            elif isinstance(x, gl.constexpr):
                self[name] = x.value
            elif isinstance(x, (JITFunction, InterpretedFunction)):
                self[name] = translated(x, known)


def translated(kernel: Any, known: dict[int, Translated]) -> FunctionType:
    """The Python function of a kernel, its names replaced."""
    names = kernel.fn.__globals__
    within = known.get(id(names)) or Translated(names, known)
    return FunctionType(kernel.fn.__code__, within, kernel.fn.__name__)


def argument(x: Any) -> Any:
    """What a kernel gets for an argument of its launch."""
    if isinstance(x, Tensor):
        return Pointer(x)
    if isinstance(x, TensorDescriptor):
        return Descriptor(x)
    if isinstance(x, tuple):
        parts = [argument(one) for one in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


class Emulated:
    """In a kernel's place: ``kernel[grid](...)`` runs its programs one after the other."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel, self.function = kernel, translated(kernel, {})

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **options: Any) -> None:
            given = [argument(x) for x in args]
            for program in range(grid[0]):
                here.block = Block(program)
                self.function(*given, **options)

        return launch


@contextmanager
def emulated(*modules: Any) -> Iterator[None]:
    """Within the block, launches of the modules' ``_kernel`` are emulated."""
    kernels = [module._kernel for module in modules]
    for module, kernel in zip(modules, kernels, strict=True):
        module._kernel = Emulated(kernel.kernel if isinstance(kernel, Emulated) else kernel)
    try:
        yield
    finally:
        for module, kernel in zip(modules, kernels, strict=True):
            module._kernel = kernel
