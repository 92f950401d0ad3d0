"""What the first call on a GPU waits for: imports, and Triton's reading of its own files.

By the hash of those files (400 MB; a third of a second or more) Triton finds what it compiled before. It is made in a
thread beside our imports, for hashing and reading leave the interpreter to others, and kept for the next process in
Triton's cache, under the sizes and times of the files.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from threading import Thread, current_thread, get_ident
from types import ModuleType

import torch

_BEGUN: list[Thread] = []


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def has_card() -> bool:
    """Whether kernels are compiled: Triton's interpreter asks for no hash."""
    return torch.cuda.is_available()


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected meanwhile: for imports, which make thousands of objects and hardly any garbage.

    A full collection looks at every object of torch, a tenth of a second each, and an import of Triton sets off two.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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


def read_triton() -> None:
    """Have Triton know the hash of its files: as a process before found it, where no file changed since, or anew.

    A name in the cache is a hash of every file's path, size, and times of its content and of its entry (no program sets
    that one). What cannot be kept is found anew, so that nothing is lost but time.
    """
    home, found = _home(), triton_key()
    kept: Path | None = None
    with suppress(Exception):  # no such cache in this Triton, or one that is not on a disk
        kept = _kept()
        known = kept.read_text() if kept.is_file() else ""
        if known.startswith(_version()):
            home.triton_key = wraps(found)(lambda: known)  # type: ignore[attr-defined]  # as its own workers are given it
            return
    known = found()
    with suppress(Exception):  # a disk that is full, or not ours to write
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_name(f"{kept.name}.{os.getpid()}.{get_ident()}")
            part.write_text(known)
            part.replace(kept)


def triton_key() -> Callable[[], str]:
    """Triton's function that hashes its own files, and remembers the hash."""
    found: Callable[[], str] = _home().triton_key
    return found


def _home() -> ModuleType:
    """The module of ``triton_key``, where Triton looks for it."""
    from triton.compiler import compiler  # before Triton 3.5
    from triton.runtime import cache as home

    found: ModuleType = home if hasattr(home, "triton_key") else compiler
    return found


def _version() -> str:
    from triton import __version__

    return str(__version__)


def _kept() -> Path:
    """Where the hash of Triton's files as they are is kept."""
    import triton
    from triton import knobs

    root, state = os.path.dirname(os.path.abspath(triton.__file__)), hashlib.sha256(_version().encode())
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for path in (os.path.join(folder, name) for name in sorted(names) if name.endswith((".py", ".so"))):
            about = os.stat(path)
            state.update(f"{path} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}\n".encode())
    return Path(knobs.cache.dir) / f"headscope-triton-{state.hexdigest()}"
