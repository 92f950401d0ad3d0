"""What is installed against what headscope asks for, from the metadata of the installed packages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

OF = "headscope"
DEVELOPMENT = "dev"  # the extra of those who change headscope: no business of those who use it
BASE = "always"


@dataclass(frozen=True)
class Package:
    """One line of what headscope asks for: ``part`` is the extra that asks, or "always"; ``state`` is "ok", "missing"
    or "wrong version"."""

    name: str
    installed: str | None
    wanted: str
    part: str
    state: str

    @property
    def broken(self) -> bool:
        """A package that is needed and not there, or one that is there in a version that will not do."""
        return self.state == "wrong version" or (self.state == "missing" and self.part == BASE)


@dataclass(frozen=True)
class Trap:
    """What versions of a package do wrong, silently, in use that headscope does not stand between; ``versions`` begin
    with the lowest that headscope takes, ``seen`` is the one on which it was found by running."""

    package: str
    versions: str
    seen: str
    says: str


# from runs, not from reports; a line goes when a version is out that does it right and the bound says so
TRAPS = (
    Trap(
        "triton",
        ">=3.4,<3.7",
        "3.6.0",
        "its ptxas crashes on some wide kernels, on Hopper narrow value tiles come out wrong; headscope's kernels go "
        "around both, kernels of your own may not",
    ),
    Trap(
        "transformers",
        ">=5.13",
        "5.23.0",
        "output_attentions=True under sdpa gives no attentions and one warning: load with attn_implementation='eager' "
        "to see maps; sdpa leaves out the sink logits of gpt-oss without a word (its default is eager)",
    ),
    Trap(
        "transformer-lens",
        ">=4.3",
        "4.3.0",
        "boot_transformers changes the Hugging Face model in place (eager attention, empty attentions): compare with a "
        "copy; hook_z of multi-head latent attention (DeepSeek) is cut into heads wrongly; hook_rot_q of GPT-NeoX is "
        "never called",
    ),
    Trap(
        "accelerate",
        ">=1.2",
        "1.15.0",
        "`accelerate launch --cpu --num_processes 2` starts one process and says nothing: use torchrun on a CPU",
    ),
)


def packages() -> list[Package]:
    """What headscope asks for, extras included, each line once.

    Raises:
        PackageNotFoundError: headscope itself is not installed (``importlib.metadata``).
    """
    found: dict[tuple[str, str], Package] = {}
    about = metadata.distribution(OF)
    extras = [one for one in about.metadata.get_all("Provides-Extra") or () if one != DEVELOPMENT]
    for line in about.requires or ():
        need = Requirement(line)
        if need.name == OF:
            continue
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            parts = [BASE]
        else:
            parts = [extra for extra in extras if need.marker.evaluate({"extra": extra})]
        for part in parts:
            found[canonical(need.name), part] = _package(need, part)
    return list(found.values())


def conflicts() -> Iterator[str]:
    """What the packages that headscope asks for ask of each other and do not get (torch asks for one Triton, say)."""
    ours = {canonical(one.name): one for one in packages() if one.installed}
    for name in sorted(ours):
        for line in metadata.distribution(name).requires or ():
            need = Requirement(line)
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            there = version(need.name)
            if there is None:
                yield f"{name} asks for {need.name}, which is not installed"
            elif not need.specifier.contains(there, prereleases=True):
                yield f"{name} asks for {need.name}{need.specifier}, and {there} is installed"


def traps() -> list[Trap]:
    """The traps of what is installed."""
    there = {trap.package: version(trap.package) for trap in TRAPS}
    return [trap for trap in TRAPS if (found := there[trap.package]) and within(found, trap.versions)]


def within(found: str, versions: str) -> bool:
    """Whether a version is one of those; of torch's "2.13.0+cpu" what is before the sign counts."""
    return Requirement(f"x{versions}").specifier.contains(Version(found).base_version, prereleases=True)


def version(name: str) -> str | None:
    """The installed version of a package; None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _package(need: Requirement, part: str) -> Package:
    there, wanted = version(need.name), str(need.specifier) or "any"
    state = "missing" if there is None else "ok"
    if there is not None and not need.specifier.contains(there, prereleases=True):
        state = "wrong version"
    return Package(need.name, there, wanted, part, state)
