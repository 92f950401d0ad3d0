"""What a first call need not do again: Triton's hash of its files is kept while no file of it changes."""

from __future__ import annotations

import gc
import os
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from headscope.kernels import first_call

triton = pytest.importorskip("triton")
HASH = "a hash"


class Process:
    """Triton as a process finds it, whose hash says how often it was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, made: str = HASH) -> None:
        self.times, self.home = 0, ModuleType("home")

        @cache
        def triton_key() -> str:
            self.times += 1
            return triton.__version__ + made

        self.home.triton_key = triton_key  # type: ignore[attr-defined]
        monkeypatch.setattr(first_call, "_home", lambda: self.home)

    def key(self) -> str:
        first_call.read_triton()
        return first_call.triton_key()()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of an installation of Triton, with a cache beside it."""
    file = tmp_path / "triton" / "compiler" / "code.py"
    file.parent.mkdir(parents=True)
    file.write_text("x = 1")
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "triton" / "__init__.py"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return file


def test_the_next_process_does_not_hash(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Process(monkeypatch)
    assert first.key() == triton.__version__ + HASH and first.times == 1
    second = Process(monkeypatch, "never made")
    assert second.key() == triton.__version__ + HASH and second.times == 0


def test_a_file_that_changed_is_hashed_anew(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its size and the time of its content are as before."""
    Process(monkeypatch).key()
    before = installed.stat()
    installed.write_text("x = 2")
    os.utime(installed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert installed.stat().st_size == before.st_size and installed.stat().st_mtime_ns == before.st_mtime_ns
    second = Process(monkeypatch, "another")
    assert second.key() == triton.__version__ + "another" and second.times == 1
    (installed.parent / "more.py").write_text("")
    third = Process(monkeypatch, "a third")
    assert third.key() == triton.__version__ + "a third"


def test_what_is_kept_is_of_this_version(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_call._kept().parent.mkdir()
    first_call._kept().write_text("")
    process = Process(monkeypatch)
    assert process.key() == triton.__version__ + HASH and process.times == 1
    assert first_call._kept().read_text() == triton.__version__ + HASH


def test_without_a_place_to_keep_it_is_hashed(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("no folder")
    for _ in range(2):
        process = Process(monkeypatch)
        assert process.key() == triton.__version__ + HASH and process.times == 1


def test_triton_asks_for_the_hash_that_it_is_given(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the version that is installed: a kernel's name in its cache begins with it."""
    home = first_call._home()
    if not hasattr(home, "get_cache_key"):
        pytest.skip("Triton 3.4 asks inside of the function that compiles")
    monkeypatch.setattr(home, "triton_key", home.triton_key)  # put back afterwards
    first_call._kept().parent.mkdir()
    first_call._kept().write_text(triton.__version__ + HASH)
    first_call.read_triton()
    nothing = SimpleNamespace(hash=str)
    assert home.get_cache_key(nothing, nothing, nothing, {}).startswith(triton.__version__ + HASH)


def test_collecting_is_left_as_it_was() -> None:
    for before in (True, False):
        (gc.enable if before else gc.disable)()
        try:
            with pytest.raises(KeyError), first_call.uncollected():
                assert not gc.isenabled()
                raise KeyError
            assert gc.isenabled() == before
        finally:
            gc.enable()
