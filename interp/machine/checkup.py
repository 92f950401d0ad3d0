"""Everything that decides whether headscope works here, as rows and findings: ``headscope doctor``."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from headscope.interp.machine import installed

NEEDED = ("torch", "transformers")  # whatever else cannot be imported says so where it is used
DRIVER = Path("/proc/driver/nvidia/version")
_GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One thing to know: ``level`` is "broken" (something will not work), "warning" or "note"; ``fix`` says what to
    do, "" where there is nothing to."""

    level: str
    about: str
    says: str
    fix: str = ""


@dataclass
class Checkup:
    """What was found; everything in it is JSON-able by ``asdict``."""

    machine: dict[str, Any]
    packages: list[installed.Package] = field(default_factory=list)
    cards: list[dict[str, Any]] = field(default_factory=list)
    engines: list[Any] = field(default_factory=list)
    warmed: list[Any] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        """Whether something does not work."""
        return any(one.level == "broken" for one in self.findings)

    def add(self, level: str, about: str, says: str, fix: str = "") -> None:
        """One more finding."""
        self.findings.append(Finding(level, about, says, fix))

    def document(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {"broken": self.broken, **asdict(self)}


def checkup(*, warm: bool = False) -> Checkup:
    """Look at this machine; ``warm`` also compiles the kernels of every GPU and holds them to the definition: about two
    minutes for an H200 with an empty cache of Triton's, seconds after that."""
    found = Checkup(_machine())
    _look_at_packages(found)
    if all(_imports(found, name) for name in NEEDED):
        _look_at_cards(found, warm)
    _look_at_cache(found)
    return found


def _machine() -> dict[str, Any]:
    return {
        "headscope": installed.version(installed.OF),
        "imported from": str(Path(__file__).parent.parent),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }


def _look_at_packages(found: Checkup) -> None:
    try:
        found.packages = installed.packages()
    except metadata.PackageNotFoundError:
        says = "it is imported from a folder and not installed: what it asks for cannot be read"
        found.add("broken", installed.OF, says, "pip install -e . in the checkout")
        return
    for one in found.packages:
        if one.broken:
            says = "is not installed" if one.installed is None else f"{one.installed} is installed"
            fix = f"pip install '{one.name}{one.wanted if one.wanted != 'any' else ''}'"
            found.add("broken", one.name, f"{says}, and headscope asks for {one.wanted} ({one.part})", fix)
    for says in installed.conflicts():
        found.add("warning", says.partition(" ")[0], says, "pip install the version that it asks for")
    for trap in installed.traps():
        found.add("note", trap.package, f"{trap.says} (seen in {trap.seen})")


def _imports(found: Checkup, name: str) -> bool:
    try:
        import_module(name)
    except Exception as error:  # a package for another machine says it in many ways
        says = f"cannot be imported ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]})"
        found.add("broken", name, says, f"pip install --force-reinstall {name}")
        return False
    return True


def _look_at_cards(found: Checkup, warm: bool) -> None:
    import torch

    from headscope.kernels.checks import machine

    found.machine |= {
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    found.cards, found.engines = machine.cards(), machine.engines()
    if not found.cards and (DRIVER.exists() or shutil.which("nvidia-smi")):
        why = "torch is built without CUDA" if torch.version.cuda is None else "torch does not see it: an old driver?"
        found.add("warning", "GPU", f"there is an NVIDIA driver, and {why}", "https://pytorch.org/get-started/locally")
    for card in found.cards:
        try:
            (torch.ones(8, 8, device=card["device"]) @ torch.ones(8, 8, device=card["device"])).sum().item()
        except Exception as error:
            says = f"does not compute ({(str(error).splitlines() or [''])[0][:200]})"
            found.add("broken", card["device"], says, "a torch built for this card and driver")
    for one in found.engines:
        if one.name == "Triton" and not one.runs:
            found.add("warning", one.device, f"no Triton kernels: {one.says}; slower engines compute the same")
    if found.cards and machine.interpreted():
        says = "Triton interprets its kernels on the CPU, thousands of times slower"
        found.add("warning", machine.INTERPRETER, says, f"unset {machine.INTERPRETER}")
    if warm and not found.cards:
        found.add("note", "--warm", "there is no GPU here: nothing to compile, the streaming engine needs no kernels")
    elif warm:
        found.warmed = list(machine.warm([card["device"] for card in found.cards]))
        for one in found.warmed:
            if one.fault:
                found.add("broken", one.device, f"{one.call}: {one.fault}", "another triton, or engine='streaming'")


def _look_at_cache(found: Checkup) -> None:
    from headscope.interp.models.available import available_models
    from headscope.interp.models.packages import cache_root

    root = cache_root()
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            writable = True
    except OSError:
        writable = False
    free = shutil.disk_usage(there).free
    found.cache = {"folder": str(root), "writable": writable, "free": free}
    if not writable:
        found.add("broken", "cache", f"{there} cannot be written to", "set HEADSCOPE_CACHE to another folder")
    found.models = [asdict(one) for one in available_models()]
    for one in found.models:
        if not one["cached"] and free < 2 * one["size"]:
            needs = 2 * one["size"] / _GB
            says = f"{one['name']} takes about {needs:.1f} GB while it is made, and {free / _GB:.1f} are free"
            found.add("warning", "cache", says, "free some, or set HEADSCOPE_CACHE to another disk")
