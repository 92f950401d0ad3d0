"""A call of kernels that comes again is started again, without deciding what it starts.

Python's share of a call (checks, sizes, tiles, masks, Triton's search for the compiled kernel) depends on shapes,
strides and options only, and a model asks the same of layer after layer. So what a call started is recorded where it
comes the second time, and from the third on only its room is made and its kernels are started, on the new tensors.

A recording is made under torch's eyes: if the call runs any operation of torch's beside making room and views, gives a
kernel a tensor that is neither its input nor its own room, or gives back anything else than whole room, it is not kept,
and every later call of its kind decides anew. A kind is everything that the call may depend on; see ``again``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

MOST = 1024  # kinds that are remembered, the oldest first forgotten: every length of a text that grows is one
ROOM = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
ZEROS = {"zeros", "zeros_like", "new_zeros"}
VIEWS = {"alias", "as_strided", "detach", "expand", "select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view"}
Results = tuple[Tensor | None, ...]
T = TypeVar("T")
# Which of a call's tensors, or what is made of them, as they are and as a kernel takes them.
_Fill = int | Callable[[Sequence[Tensor], Sequence[Any]], Any]
# Room as torch's own compiler makes it, in a third of the time of ``torch.empty``; it is made on the current device.
_GUARDS = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_EMPTY = {kind: getattr(_GUARDS, f"_empty_strided_{kind}", None) for kind in ("cpu", "cuda")}
_STREAM = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # as Triton asks for it


class Room(NamedTuple):
    """A contiguous tensor that the call makes: of zeros, or as memory comes."""

    zeros: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Start(NamedTuple):
    """A kernel that is started on ``args``; of those, ``fills`` are made of the call's tensors.

    What Triton ``compiled`` takes addresses: of a tensor it would ask where it lies, and the driver if a card sees it.
    """

    run: Callable[..., Any]
    compiled: bool
    args: list[Any]
    fills: list[tuple[int, _Fill]]


class Recorded(NamedTuple):
    """What a call does: tensors made of inputs (``derived``), room, kernels, and which tensors (inputs, derived ones,
    room) are its results."""

    derived: list[tuple[Callable[..., Tensor], int, tuple[Any, ...]]]
    rooms: list[Room]
    starts: list[Start]
    results: list[int | None]


_KINDS: dict[Hashable, Recorded | None] = {}  # None: not to be recorded
_UNKNOWN = object()
_ONCE: dict[Hashable, None] = {}
_RECORDING: ContextVar[_Recording | None] = ContextVar("recording", default=None)


def again(
    run: Callable[[], Results], tensors: Sequence[Tensor | None], about: Hashable, *, at_once: bool = False
) -> Results:
    """``run()``, or what it started when it was called before.

    Args:
        run: starts kernels by ``device.launch`` on tensors of its own making and on ``tensors``.
        tensors: all that it reads, one on its device first.
        about: whatever else it depends on, its name included; of the tensors, all but their content is added.
        at_once: the first call of a kind is recorded, not the second: in a decoding step, whose length comes once, the
            layers' calls come again for sure.
    """
    if _RECORDING.get() is not None:  # it is part of a call that is recorded
        return run()
    kinds = [None if x is None else (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16) for x in tensors]
    kind = (about, *kinds)
    known = _KINDS.get(kind, _UNKNOWN)
    if isinstance(known, Recorded) and _is_here(tensors[0]):
        return _replayed(known, tensors)
    if known is not _UNKNOWN:
        return run()
    if kind not in _ONCE and not at_once:
        _remember(_ONCE, kind, None)
        return run()
    recording = _Recording([x for x in tensors if x is not None])
    with recording.watching():
        results = run()
    _remember(_KINDS, kind, recording.made(results))
    return results


def forget() -> None:
    """Forget every recording: what tiles a kernel has was changed by hand."""
    _KINDS.clear()
    _ONCE.clear()


def started(run: Callable[..., Any] | None, args: tuple[Any, ...], *, compiled: bool = False) -> None:
    """A kernel was started on ``args``; ``run(*args)`` does it once more, if it is not None.

    ``compiled``: a launcher of Triton's, which takes addresses in place of tensors, and a ``stream``.
    """
    recording = _RECORDING.get()
    if recording is not None:
        recording.starts.append((run, args, compiled))


def derived(make: Callable[..., T], x: Tensor, rest: tuple[Any, ...]) -> T:
    """``make(x, *rest)``, which is computed once for what ``x`` holds: a recording asks it of its own ``x``."""
    recording = _RECORDING.get()
    if recording is None:
        return make(x, *rest)
    with _disable_current_modes():
        found = make(x, *rest)
    recording.derived.append((make, x, rest, found))
    return found


def _is_here(x: Tensor | None) -> bool:
    """Whether ``x`` is on the card on which kernels start."""
    return x is not None and (not x.is_cuda or x.get_device() == torch.cuda.current_device())


def _remember(where: dict[Hashable, Any], kind: Hashable, what: Any) -> None:
    if len(where) >= MOST:
        where.pop(next(iter(where)), None)
    where[kind] = what


def _replayed(known: Recorded, tensors: Sequence[Tensor | None]) -> Results:
    given = [x for x in tensors if x is not None]
    device = given[0].device
    if known.derived:
        given += [make(given[at], *rest) for make, at, rest in known.derived]
    empty = _EMPTY.get(device.type)
    for zeros, shape, stride, dtype in known.rooms:
        if zeros:
            given.append(torch.zeros(shape, dtype=dtype, device=device))
        elif empty is None:
            given.append(torch.empty(shape, dtype=dtype, device=device))
        else:
            given.append(empty(shape, stride, dtype))
    places = [x.data_ptr() for x in given]
    stream = _STREAM(device.index) if _STREAM is not None and device.type == "cuda" else None  # None: Triton asks
    for run, compiled, args, fills in known.starts:
        if compiled:
            run(*_put(args, fills, given, places), stream=stream)
        else:
            run(*_put(args, fills, given, given))
    return tuple([None if at is None else given[at] for at in known.results])


class _Recording(TorchDispatchMode):
    """What a call does to the tensors ``given`` and to the room that it makes."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.given = given
        self.rooms: list[Tensor] = []
        self.zeros: list[bool] = []
        self.derived: list[tuple[Callable[..., Any], Tensor, tuple[Any, ...], Any]] = []
        self.starts: list[tuple[Callable[..., Any] | None, tuple[Any, ...], bool]] = []
        self.faithful = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Room is noted, views pass, and anything else makes the recording worthless."""
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ROOM or name in ZEROS:
            self.rooms.append(made)
            self.zeros.append(name in ZEROS)
        elif name not in VIEWS:
            self.faithful = False
        return made

    @contextmanager
    def watching(self) -> Iterator[None]:
        token = _RECORDING.set(self)
        try:
            with self:
                yield
        finally:
            _RECORDING.reset(token)

    def made(self, results: Results) -> Recorded | None:
        """What is kept; None where doing it again would not be the same call."""
        device, inputs = self.given[0].device, {x.data_ptr(): at for at, x in enumerate(self.given)}
        faithful = self.faithful and all(x.is_contiguous() and x.device == device for x in self.rooms)
        runs = [(run, args, compiled) for run, args, compiled in self.starts if run is not None]
        known = [isinstance(found, Tensor) and x.data_ptr() in inputs for _, x, _, found in self.derived]
        if not (faithful and runs and all(known)) or len(runs) < len(self.starts):
            return None
        before = [*self.given, *(found for *_, found in self.derived)]
        everything = [*before, *self.rooms]
        places = {x.data_ptr(): at for at, x in enumerate(everything)}
        if len(places) < len(everything) or 0 in places:  # two at one place cannot be told apart
            return None
        try:
            starts = [Start(run, compiled, *_parts(args, places)) for run, args, compiled in runs]
            ends = [None if x is None else places[x.data_ptr()] for x in results]
        except KeyError:  # a tensor from elsewhere
            return None
        rooms = [_room(zeros, x) for zeros, x in zip(self.zeros, self.rooms, strict=True)]
        for at, x in zip(ends, results, strict=True):
            if at is None or x is None:
                continue
            room = at - len(before)
            if room < 0 or not x.is_contiguous() or x.numel() != self.rooms[room].numel():
                return None
            rooms[room] = _room(self.zeros[room], x)  # as it is given back
        derived = [(make, inputs[x.data_ptr()], rest) for make, x, rest, _ in self.derived]
        return Recorded(derived, rooms, starts, ends)


def _room(zeros: bool, x: Tensor) -> Room:
    return Room(zeros, tuple(x.shape), x.stride(), x.dtype)


def _parts(values: Sequence[Any], places: dict[int, int]) -> tuple[list[Any], list[tuple[int, _Fill]]]:
    """``values`` without those that hold tensors, for no tensor stays in memory, and how those are made.

    Raises KeyError as ``_filled`` does.
    """
    fills = [_filled(x, places) for x in values]
    kept = [x if fill is None else None for x, fill in zip(values, fills, strict=True)]
    return kept, [(at, fill) for at, fill in enumerate(fills) if fill is not None]


def _put(kept: list[Any], fills: list[tuple[int, _Fill]], tensors: Sequence[Tensor], taken: Sequence[Any]) -> list[Any]:
    """The values whose ``_parts`` these are, of other ``tensors``, in the form in which they are ``taken``."""
    whole = kept.copy()
    for at, fill in fills:
        whole[at] = taken[fill] if type(fill) is int else fill(tensors, taken)  # type: ignore[operator]
    return whole


def _filled(arg: Any, places: dict[int, int]) -> _Fill | None:
    """How an argument of a kernel is made of a call's tensors; None if it holds none.

    Raises:
        KeyError: it holds a tensor that is not the call's.
    """
    if isinstance(arg, Tensor):
        return places[arg.data_ptr()]
    if hasattr(arg, "block_shape"):
        return _descriptor(arg, places[arg.base.data_ptr()])
    if not isinstance(arg, tuple | list):
        return None
    kept, fills = _parts(arg, places)
    make = getattr(type(arg), "_make", type(arg))
    return (lambda tensors, taken: make(_put(kept, fills, tensors, taken))) if fills else None


def _descriptor(arg: Any, at: int) -> _Fill:
    """As ``arg``, but of the tensor ``at``; what is checked when a descriptor is made holds of that one too."""
    kind, fields = type(arg), {name: value for name, value in vars(arg).items() if name != "base"}

    def fill(tensors: Sequence[Tensor], _: Sequence[Any]) -> Any:
        made = object.__new__(kind)
        made.__dict__ = {**fields, "base": tensors[at]}
        return made

    return fill
