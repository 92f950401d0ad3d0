"""What the groups of a program share, for ``emulator``: tiles in shared memory, barriers, the matrix and copy units."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from headscope.kernels.hopper.emulated_values import Value, plain


class Deadlock(RuntimeError):
    """All groups wait."""


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


class Pending(Value):
    """A product that was issued; ``result`` exists once it was waited for."""

    def __init__(self, a: Value | Shared, b: Shared, c: Value, use_acc: bool) -> None:
        self.a, self.b, self.c = a, b, c if use_acc else 0.0  # ``c`` may be a product that this one follows
        self.result: Value | None = None

    @property
    def x(self) -> Tensor:  # type: ignore[override]
        raise RuntimeError("a product was used before it was waited for")

    def finish(self) -> None:
        if self.result is None:
            sums = self.c.result if isinstance(self.c, Pending) else self.c
            self.result = Value(self.a.x.float() @ self.b.x.float() + plain(sums))


here = threading.local()  # .block, in each of its threads


def this_block() -> Block:
    block: Block = here.block
    return block


def warpgroup_mma(a: Any, b: Shared, c: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Pending(a, b, c, use_acc)
    this_block().issued().append(product)
    return product if is_async else warpgroup_mma_wait(0, deps=[product])


def warpgroup_mma_wait(left: int, deps: list[Pending]) -> Any:
    products = this_block().issued()
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
    this_block().send(barrier, tile.x, part, at.block_type.nbytes)


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


def _arrive(barrier: Barrier, pred: Any = True) -> None:
    if pred:
        this_block().alter(barrier, arrivals=1)


MBARRIER = SimpleNamespace(
    MBarrierLayout=lambda: Barrier,
    init=_init,
    expect=lambda barrier, count: this_block().alter(barrier, arrivals=1, announced=count),
    wait=lambda barrier, parity: this_block().wait(barrier, int(plain(parity))),
    arrive=_arrive,
)


def allocate_shared_memory(dtype: Any, shape: list[int], layout: Any, value: Any = None) -> Any:
    if layout is Barrier:
        made = [Barrier() for _ in range(shape[0])]
        return SimpleNamespace(index=lambda i: made[int(i)], shape=shape)
    return Shared(torch.full(shape, float("nan"), dtype=dtype) if value is None else value.x)


def warp_specialize(groups: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
    """Run every group in a thread of its own."""
    block = this_block()

    def run(body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        here.block = block
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
