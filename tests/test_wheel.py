"""What is built from the repository works where there is no repository: the sdist, the wheel that it gives, and an
environment that has what headscope asks for and headscope from that wheel alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("interp", "kernels", "interventions", "probes")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
INSIDE = """
import sys
from importlib import import_module, metadata
from pathlib import Path
from headscope import interp, interventions, probes
from headscope.kernels import attention, masks
from headscope.interp.explorer.assets import script, style
from headscope.interp.prompts import load_haystack, load_needles
assert len(load_haystack()) > 100_000 and load_needles(3)
assert "render" in script() and ".headscope-explorer" in style()
loaded = {name: Path(m.__file__) for name, m in sys.modules.items() if name.startswith("headscope.") and m.__file__}
strangers = [name for name, file in loaded.items() if not file.is_relative_to(sys.prefix)]
assert len(loaded) > 20 and not strangers, strangers
print(metadata.version("headscope"))
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def shipped(room: str) -> set[str]:
    """Files of a room that an installation must have, as they are named in a wheel: its packages' modules, and their
    data. ``interp/results`` is a package, other folders of that name hold what was measured."""
    found = set()
    for path in (ROOT / room).rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith((".", "__pycache__")) for part in parts)
        measured = "benchmarks" in parts or ("results" in parts and path.suffix != ".py")
        if path.is_file() and not hidden and not measured and path.name != "README.md":
            found.add("/".join(("headscope", *parts)))
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a copy of the repository, and the wheel that is built from that sdist."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "repository"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    run(sys.executable, "-c", BUILD, "build_sdist", folder, cwd=copy)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    run(sys.executable, "-c", BUILD, "build_wheel", folder, cwd=folder / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def clean(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment with the wheel; what it asks for comes from the tests' environment,
    whose own headscope is not seen: a path file's folder is searched, but its path files are not read."""
    home = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    programs = home / "bin"
    place = Path(
        run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    )
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", programs / "python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", built[1], cwd=home)
    (place / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


@pytest.mark.slow
def test_the_wheel_holds_the_rooms_and_nothing_else(built: tuple[Path, Path]) -> None:
    """Both are compared with the disk, so that a file of data that pyproject does not name is found here."""
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    wanted = set().union(*(shipped(room) for room in ROOMS))
    assert {
        "headscope/kernels/py.typed",
        "headscope/interp/explorer/page/app.js",
        "headscope/interp/data/report.css",
    } <= wanted
    assert wanted - names == set(), "in the repository and not in the wheel: package-data in pyproject.toml"
    assert {name for name in names - wanted if not name.endswith("README.md")} == set()
    assert built[1].stat().st_size < 40e6


@pytest.mark.slow
def test_the_installed_package_works_without_the_repository(clean: Path, tmp_path: Path) -> None:
    version = run(clean / "headscope", "--version", cwd=tmp_path).split()[-1]
    assert run(clean / "python", "-c", INSIDE, cwd=tmp_path).strip() == version
    assert "induction" in run(clean / "headscope", "list", "methods", cwd=tmp_path)
