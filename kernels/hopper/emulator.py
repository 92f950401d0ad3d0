"""Gluon kernels for Hopper run as Python on the CPU: a thread for each group of warps, with the card's barriers.

It knows what the kernels here use, and holds them to what a card does to those who break its rules. Shared memory
begins as NaN; a tile comes when its barrier is waited for, not before; a product is computed where it is waited for, of
what lies in shared memory by then; one that is not waited for cannot be used; and groups that all wait for each other
are an error. What it cannot see: a missing fence, numbers that wrap around in int32, registers.
"""

from __future__ import annotations

import operator
import threading
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


class Deadlock(RuntimeError):
    """All groups wait."""


# -- values ------------------------------------------------------------------------------------------------------------


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
    return x.x if isinstance(x, (Value, Pending)) else x


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
    return _lift(torch.where)(condition, a, b)


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


# -- shared memory, barriers, products ---------------------------------------------------------------------------------


class Shared:
    """Tiles in shared memory, or one of them, or a view of it."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape, self.dtype = x, list(x.shape), x.dtype

    def index(self, i: Any) -> Shared:
        return Shared(self.x[int(i)])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.x.view(shape))

    def load(self, layout: Any) -> Value:
        return Value(self.x.clone())

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.x.permute(order))


class Barrier:
    """An mbarrier: its phase ends when all have arrived and all bytes that were announced have come."""

    def __init__(self) -> None:
        self.phase = self.count = self.missing = self.bytes = 0
        self.coming: list[tuple[Tensor, Tensor, int]] = []  # tile, what it will hold, bytes

    def land(self) -> None:
        """Let what was fetched arrive."""
        for tile, part, size in self.coming:
            tile.zero_()
            tile[tuple(slice(0, n) for n in part.shape)] = part
            self.bytes -= size
        self.coming.clear()
        self.settle()

    def settle(self) -> None:
        if self.missing == 0 and self.bytes == 0 and not self.coming:
            self.phase, self.missing = self.phase + 1, self.count


class Block:
    """What the groups of one program share: who runs, who waits for what, and the products each has issued."""

    def __init__(self, program: int) -> None:
        self.program, self.change = program, threading.Condition()
        self.running = 1
        self.waiting: dict[str, tuple[Barrier, int]] = {}
        self.failure: BaseException | None = None
        self.products: dict[str, list[Pending]] = {}

    def issued(self) -> list[Pending]:
        """The products that this group has issued and not waited for."""
        return self.products.setdefault(threading.current_thread().name, [])

    def wait(self, barrier: Barrier, parity: int) -> None:
        me = threading.current_thread().name
        with self.change:
            self.waiting[me] = barrier, parity
            barrier.land()
            self.change.notify_all()
            while barrier.phase & 1 == parity:
                stuck = all(one.phase & 1 == its for one, its in self.waiting.values())
                if stuck and len(self.waiting) == self.running:
                    self.failure = self.failure or Deadlock(
                        f"program {self.program}: all of {sorted(self.waiting)} wait"
                    )
                if self.failure is not None:
                    self.change.notify_all()
                    raise self.failure
                self.change.wait()
            del self.waiting[me]

    def alter(self, barrier: Barrier, *, arrivals: int = 0, announced: int = 0) -> None:
        with self.change:
            barrier.missing -= arrivals
            barrier.bytes += announced
            barrier.settle()
            self.change.notify_all()

    def send(self, barrier: Barrier, tile: Tensor, part: Tensor, size: int) -> None:
        """Let a tile come by ``barrier``: at once where a group waits for it, else when one does."""
        with self.change:
            barrier.coming.append((tile, part, size))
            if any(one is barrier for one, _ in self.waiting.values()):
                barrier.land()
                self.change.notify_all()


class Pending:
    """A product that was issued; ``result`` exists once it was waited for."""

    type = Value.type

    def __init__(self, a: Value | Shared, b: Shared, c: Value, use_acc: bool) -> None:
        self.a, self.b, self.c = a, b, c if use_acc else 0.0  # ``c`` may be a product that this one follows
        self.result: Value | None = None

    @property
    def x(self) -> Tensor:
        raise RuntimeError("a product was used before it was waited for")

    def finish(self) -> None:
        if self.result is None:
            sums = self.c.result if isinstance(self.c, Pending) else self.c
            self.result = Value(self.a.x.float() @ self.b.x.float() + plain(sums))


_here = threading.local()  # .block, in each of its threads


def _block() -> Block:
    block: Block = _here.block
    return block


def warpgroup_mma(a: Any, b: Shared, c: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Pending(a, b, c, use_acc)
    _block().issued().append(product)
    return product if is_async else warpgroup_mma_wait(0, deps=[product])


def warpgroup_mma_wait(left: int, deps: list[Pending]) -> Any:
    products = _block().issued()
    while len(products) > left:
        products.pop(0).finish()
    if any(one.result is None for one in deps):
        raise RuntimeError("a product was read while it was still being computed")
    return deps[0].result if len(deps) == 1 else tuple(one.result for one in deps)


class Descriptor:
    """A tensor as the copy engine sees it."""

    def __init__(self, made: TensorDescriptor) -> None:
        self.x, self.dtype, self.layout = made.base, made.base.dtype, made.layout
        size = made.base.element_size() * torch.Size(made.block_shape).numel()
        self.block_type = SimpleNamespace(shape=list(made.block_shape), nbytes=size)


def fetch(at: Descriptor, corner: list[Any], barrier: Barrier, tile: Shared) -> None:
    begin = [int(plain(i)) for i in corner]
    part = at.x[tuple(slice(i, i + n) for i, n in zip(begin, at.block_type.shape, strict=True))]
    tile.x.fill_(float("nan"))
    _block().send(barrier, tile.x, part, at.block_type.nbytes)


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


def _arrive(barrier: Barrier, pred: Any = True) -> None:
    if pred:
        _block().alter(barrier, arrivals=1)


MBARRIER = SimpleNamespace(
    MBarrierLayout=lambda: Barrier,
    init=_init,
    expect=lambda barrier, count: _block().alter(barrier, arrivals=1, announced=count),
    wait=lambda barrier, parity: _block().wait(barrier, int(plain(parity))),
    arrive=_arrive,
)


def allocate_shared_memory(dtype: Any, shape: list[int], layout: Any, value: Any = None) -> Any:
    if layout is Barrier:
        made = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: made[int(i)], shape=shape)
    return Shared(torch.full(shape, float("nan"), dtype=dtype) if value is None else value.x)


def warp_specialize(groups: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    """Run every group in a thread of its own."""
    block = _block()

    def run(body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        _here.block = block
        try:
            body(*arguments)
        except BaseException as error:
            block.failure = block.failure or error
        with block.change:
            block.running -= 1
            block.change.notify_all()

    block.running = len(groups)
    threads = [threading.Thread(target=run, args=one, name=f"{n}: {one[0].__name__}") for n, one in enumerate(groups)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if block.failure is not None:
        raise block.failure


# -- the language ------------------------------------------------------------------------------------------------------


def _lift(function: Callable[..., Tensor]) -> Callable[..., Value]:
    def call(*args: Any, **options: Any) -> Value:
        return Value(function(*(torch.as_tensor(plain(x)) for x in args), **options))

    return call


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
    program_id=lambda axis: Value(torch.tensor(_block().program)),
    arange=lambda a, b, layout=None: Value(torch.arange(a, b, dtype=torch.int32)),
    zeros=lambda shape, dtype, layout=None: Value(torch.zeros(shape, dtype=dtype)),
    zeros_like=_lift(torch.zeros_like),
    full=lambda shape, x, dtype, layout=None: Value(torch.full(shape, x, dtype=dtype)),
    where=where,
    minimum=_lift(torch.minimum),
    maximum=_lift(torch.maximum),
    abs=_lift(torch.abs),
    exp2=_lift(torch.exp2),
    log2=_lift(torch.log2),
    sqrt=_lift(torch.sqrt),
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
    "logarithm": _lift(torch.log2),
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
                _here.block = Block(program)
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
