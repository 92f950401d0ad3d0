"""Writing results so that an interruption never leaves half a file, and never two processes the same one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import overload

from filelock import FileLock, Timeout

from headscope.interp.errors import HeadscopeError


@overload
def folder_of(out: None) -> None: ...
@overload
def folder_of(out: str | Path) -> Path: ...
@overload
def folder_of(out: str | Path | None) -> Path | None: ...
def folder_of(out: str | Path | None) -> Path | None:
    """Where a run writes, as it was given; None keeps everything in memory.

    Raises:
        HeadscopeError: no path.
    """
    if out is None:
        return None
    if not isinstance(out, str | os.PathLike):
        raise HeadscopeError(f"{out!r:.60} is no folder: give the path of one, e.g. 'runs/first'")
    return Path(out)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the system says of writing ``path`` (disk full, read-only, no permission) into one line.

    Raises:
        HeadscopeError: for every OSError inside.
    """
    try:
        yield
    except Timeout:  # of a lock; it is an OSError, too
        raise
    except OSError as error:
        cause = error.strerror or " ".join(str(error).split())
        raise HeadscopeError(f"cannot write {path} ({cause}); make room there, or choose another output") from error


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all: a sibling temporary file, flushed, then renamed over it.

    Raises:
        HeadscopeError: the disk is full, or the folder cannot be written.
    """
    with writing(path):
        _write(Path(path), data)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}.{os.urandom(8).hex()}"
    try:
        # a new file, as the umask allows: mkstemp's 0600 would hide results from a shared folder's readers, and to ask
        # for the umask is to change it, for all threads
        with open(unfinished, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: str | Path | None) -> Iterator[None]:
    """Keep ``path``, a file or folder that a run writes, for one run at a time; None is nobody's.

    The lock is a hidden file beside it that the system releases when the process dies, however it dies.

    Raises:
        HeadscopeError: another run holds it, or nothing can be written there.
    """
    if path is None:
        yield
        return
    path = Path(path)
    lock = FileLock(path.parent / f".{path.name}.lock", timeout=0)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout as error:
        raise HeadscopeError(
            f"another process is writing {path}; wait for it or stop it, or choose another output folder"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()  # while it is held: who opened it meanwhile sees that it has no name
        lock.release()
