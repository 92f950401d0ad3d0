"""Records at a URL (``s3://bucket/run``, ``gs://``, ``memory://``: whatever fsspec opens), with a copy on this machine.

A record is a folder of files that are written once, so that a copy of it is the record. It is written and read in the
copy; ``keep`` sends what is finished, a part's list of files last: a part without one does not exist.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import platformdirs

from headscope.interp.errors import HeadscopeError
from headscope.interp.records.checksums import FOLDER
from headscope.interp.runs.files import folder_of


class Store:
    """Where a record goes beside this machine: nowhere."""

    def keep(self, name: str) -> None:
        """A part, or a file, of the record is finished."""


class _Remote(Store):
    """The folder at ``url``, and its copy ``here``."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            from fsspec.core import url_to_fs

            self.files, self.root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise HeadscopeError(f"{url} cannot be opened ({error}); install what fsspec asks for") from error
        cache = Path(os.environ.get("HEADSCOPE_CACHE") or platformdirs.user_cache_dir("headscope"))
        self.here = cache / "records" / hashlib.sha256(url.encode()).hexdigest()[:16]
        self.here.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str) -> None:
        listed = f"{FOLDER}/{name}.json"
        try:
            for each in (name, listed) if (self.here / listed).exists() else (name,):
                self._send(each)
        except OSError as error:
            raise HeadscopeError(f"cannot write to {self.url} ({error}); what is finished is kept there") from error

    def fetch(self) -> None:
        """Make the copy what is finished there: a part that was never sent is traced again."""
        try:
            there = self.files.find(self.root) if self.files.exists(self.root) else []
        except OSError as error:
            raise HeadscopeError(f"cannot read {self.url} ({error}); check the URL and who may read it") from error
        names = {self._name(file) for file in there}
        finished = {name.split("/")[1].removesuffix(".json") for name in names if name.startswith(f"{FOLDER}/")}
        for file in [file for file in self.here.rglob("*") if file.is_file() and not file.name.startswith(".")]:
            if file.relative_to(self.here).as_posix() not in names:
                file.unlink()
        for folder in [*self.here.glob("part-*"), *self.here.glob(".part-*")]:
            if folder.name not in finished:
                shutil.rmtree(folder)
        for name in sorted(names, key=lambda one: one.startswith(FOLDER)):
            part = name.split("/")[0]
            whole = part in finished or not part.startswith("part-")
            if whole and not ((self.here / name).exists() and part.startswith(("part-", FOLDER))):
                (self.here / name).parent.mkdir(parents=True, exist_ok=True)
                self.files.get_file(f"{self.root}/{name}", str(self.here / name))

    def _name(self, found: str) -> str:
        return found.removeprefix(self.root).lstrip("/")

    def _send(self, name: str) -> None:
        path = self.here / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                there = f"{self.root}/{file.relative_to(self.here).as_posix()}"
                self.files.makedirs(there.rpartition("/")[0], exist_ok=True)
                self.files.put_file(str(file), there)


def stored(out: str | Path) -> tuple[Store, Path]:
    """Where a record at ``out``, a folder or a URL, is kept beside this machine, and its folder here.

    What is finished at a URL is brought over first, so that a run on another machine continues.
    """
    if "://" not in str(out):
        return Store(), folder_of(out)
    remote = _Remote(str(out))
    remote.fetch()
    return remote, remote.here


def local(path: str | Path) -> Path:
    """The folder of a record on this machine: ``path``, or a copy of what stands at that URL."""
    return stored(path)[1]
