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

import torch

_BEGUN: list[Thread] = []


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def has_card() -> bool:
    """Whether kernels are compiled: Triton's interpreter asks for no hash."""
    return torch.cuda.is_available()


def wait() -> None:
    """Wait for what was begun: Triton asked for its hash meanwhile would begin to read anew."""
    for thread in _BEGUN:
        if thread is not current_thread():
            thread.join()


def begin(run: Callable[[], object]) -> None:
    """Run ``run`` in a thread, if it is the first that is begun."""

    def whole() -> None:
        with suppress(Exception):  # whatever is wrong, the call says
            run()

    if not _BEGUN:
        thread = Thread(target=whole)
        thread.start()
        _BEGUN.append(thread)


def triton_key() -> Callable[[], str]:
    """Triton's function that hashes its own files, and remembers the hash."""
    from triton.compiler import compiler  # its home before Triton 3.5
    from triton.runtime import cache as home

    found: Callable[[], str] = getattr(home, "triton_key", None) or compiler.triton_key
    return found
