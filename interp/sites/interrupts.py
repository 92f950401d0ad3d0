"""Blocks that an interrupt leaves whole: Ctrl-C waits while something of ours goes onto a model or comes off it."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """An interrupt (SIGINT) inside the block is delivered when it ends; blocks nest.

    Only the main thread gets signals; where the program handles them in C, nothing changes.
    """
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):
        yield
        return
    waiting: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *signalled: waiting.append(signalled))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[-1])


class _Block(contextlib._GeneratorContextManager[T]):
    """A generator's context that an interrupt between its steps ends too: without this the generator would stay where
    it is for as long as a traceback holds it."""

    def __enter__(self) -> T:
        try:
            return super().__enter__()
        except BaseException:
            self.gen.close()
            raise

    def __exit__(self, *raised: Any) -> bool | None:
        try:
            return super().__exit__(*raised)
        finally:
            self.gen.close()


def block(function: Callable[P, Iterator[T]]) -> Callable[P, contextlib.AbstractContextManager[T]]:
    """``contextlib.contextmanager`` for what stands on a model: left whole also where Ctrl-C comes as it is entered."""

    @functools.wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> contextlib.AbstractContextManager[T]:
        return _Block(function, args, kwargs)  # type: ignore[arg-type]

    return made
