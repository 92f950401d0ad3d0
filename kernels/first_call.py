"""What the first call on a GPU waits for, begun beside it in threads: imports, and Triton's reading of its own files.

By the hash of those files (400 MB; a third of a second or more of each process) Triton finds what it compiled before.
Hashing and reading leave the interpreter to others, so that our own imports go on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from threading import Thread, current_thread
from types import ModuleType

import torch

_BEGUN: list[Thread] = []


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@cache
def prepare(device: torch.device) -> None:
    """Begin all that a first call on ``device`` waits for, where that is a GPU and nobody waits yet."""
    if device.type == "cuda" and has_triton():
        _begin(lambda: _prepare(device))


@cache
def triton_engine() -> ModuleType:
    """The engine of Triton kernels, during whose import Triton begins to read its files."""
    if has_card():
        _begin(lambda: triton_key()())
    from headscope.kernels import gpu_engine

    return gpu_engine


def has_card() -> bool:
    """Whether kernels are compiled: Triton's interpreter asks for no hash."""
    return torch.cuda.is_available()


def wait() -> None:
    """Wait for what was begun: Triton asked for its hash meanwhile would begin to read anew."""
    for thread in _BEGUN:
        if thread is not current_thread():
            thread.join()


def _begin(run: Callable[[], object]) -> None:
    def whole() -> None:
        with suppress(Exception):  # whatever is wrong, the call says
            run()

    if not _BEGUN:
        _BEGUN.append(thread := Thread(target=whole))
        thread.start()


def _prepare(device: torch.device) -> None:
    from headscope.kernels import gpu_engine  # noqa: F401
    from headscope.kernels.hopper.dispatch import works_on

    works_on(device)
    triton_key()()


def triton_key() -> Callable[[], str]:
    """Triton's function that hashes its own files, and remembers the hash."""
    from triton.compiler import compiler  # its home before Triton 3.5
    from triton.runtime import cache as home

    found: Callable[[], str] = getattr(home, "triton_key", None) or compiler.triton_key
    return found
