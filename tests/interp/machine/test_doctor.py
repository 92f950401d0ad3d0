"""``headscope doctor``: what it calls broken, what it only says, and that cards are looked at without one."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from headscope.interp.cli import main
from headscope.interp.machine import checkup, installed
from headscope.kernels.checks import machine
from headscope.kernels.fallback import EngineWarning


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    return int(stopped.value.code or 0), capsys.readouterr().out


class Fake:
    """Distributions by name: a version and what each asks for."""

    def __init__(self, **packages: tuple[str, list[str]]) -> None:
        self.packages = {name.replace("_", "-"): value for name, value in packages.items()}

    def version(self, name: str) -> str:
        return self._of(name)[0]

    def distribution(self, name: str) -> SimpleNamespace:
        version, requires = self._of(name)
        extras = SimpleNamespace(get_all=lambda _: ["triton", "dev"])
        return SimpleNamespace(version=version, requires=requires, metadata=extras)

    def _of(self, name: str) -> tuple[str, list[str]]:
        if name not in self.packages:
            raise metadata.PackageNotFoundError(name)
        return self.packages[name]


ASKS = ["torch>=2.6", "zarr>=3.0", 'triton>=3.4; extra == "triton"', 'pytest>=8; extra == "dev"']


def pretend(monkeypatch: pytest.MonkeyPatch, **packages: tuple[str, list[str]]) -> None:
    fake = Fake(**packages)
    monkeypatch.setattr(installed.metadata, "version", fake.version)
    monkeypatch.setattr(installed.metadata, "distribution", fake.distribution)


def test_this_machine_is_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "--json")
    found = json.loads(out)
    assert code == 0 and not found["broken"]
    assert {"torch", "transformers", "anywidget"} <= {one["name"] for one in found["packages"]}
    assert not {"pytest", "mypy"} & {one["name"] for one in found["packages"]}
    assert found["engines"][-1] == {
        "device": "cpu",
        "name": "streaming",
        "runs": True,
        "says": found["engines"][-1]["says"],
    }
    assert found["cache"]["writable"] and {one["name"] for one in found["models"]} >= {"smollm2-135m"}
    code, out = run(capsys)
    assert code == 0 and "which kernels run" in out and "models that need no hub" in out


def test_versions_are_held_to_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["triton==3.7.0; platform_system != 'Nowhere'", "sympy>=1; extra == 'x'"]
    pretend(monkeypatch, headscope=("0.1", ASKS), torch=("2.5.1+cpu", needs), triton=("3.6.0", []))
    rows = {one.name: (one.state, one.part, one.broken) for one in installed.packages()}
    assert rows == {
        "torch": ("wrong version", "always", True),
        "zarr": ("missing", "always", True),
        "triton": ("ok", "triton", False),
    }
    assert list(installed.conflicts()) == ["torch asks for triton==3.7.0, and 3.6.0 is installed"]
    assert [trap.package for trap in installed.traps()] == ["triton"]
    pretend(monkeypatch, headscope=("0.1", ASKS), torch=("2.6.0+cu126", []), zarr=("3.1", []), triton=("3.7.0", []))
    assert not any(one.broken for one in installed.packages())
    assert list(installed.conflicts()) == [] and installed.traps() == []


def test_every_trap_is_within_what_headscope_takes() -> None:
    """A version that the bounds already refuse would be said twice; one that was not run is not known to be bad."""
    asked = {one.name: one.wanted for one in installed.packages()}
    for trap in installed.TRAPS:
        assert installed.within(trap.seen, trap.versions) and installed.within(trap.seen, asked[trap.package])
        assert trap.versions.split(",")[0] == asked[trap.package], trap


def test_what_is_broken_is_said_with_its_fix_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pretend(monkeypatch, headscope=("0.1", ASKS), torch=("2.13.0", []), triton=("3.7.0", []))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkup.tempfile, "TemporaryDirectory", lambda dir: open(tmp_path / "none" / "x"))
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    code, out = run(capsys, "--json")
    found = [(one["level"], one["about"], one["fix"]) for one in json.loads(out)["findings"]]
    assert code == 1
    assert ("broken", "zarr", "pip install 'zarr>=3.0'") in found
    assert ("broken", "cache", "set HEADSCOPE_CACHE to another folder") in found
    assert ("warning", "cache", "free some, or set HEADSCOPE_CACHE to another disk") in found


def test_a_folder_that_is_not_installed_and_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise OSError(f"lib{name}.so is for another machine")

    pretend(monkeypatch)
    monkeypatch.setattr(checkup, "import_module", fails)
    found = checkup.checkup()
    assert [(one.level, one.about) for one in found.findings] == [("broken", "headscope"), ("broken", "torch")]
    assert "lib" in found.findings[1].says and not found.engines


CARDS = [
    {"device": "cuda:0", "name": "H", "capability": "9.0", "memory": 1},
    {"device": "cuda:1", "name": "V", "capability": "7.0", "memory": 1},
]


def test_which_kernels_run_on_which_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cards", lambda: CARDS)
    monkeypatch.setattr(machine.hopper, "works_on", lambda device: True)
    monkeypatch.setattr(machine, "compiler", lambda: "/usr/bin/cc")

    def runs() -> dict[tuple[str, str], bool]:
        return {(one.device, one.name.split()[0]): one.runs for one in machine.engines()}

    first = runs()
    assert [first["cuda:0", name] for name in ("Hopper", "Triton", "FlexAttention", "streaming")] == [True] * 4
    assert [first["cuda:1", name] for name in ("Hopper", "Triton", "streaming")] == [False, False, True]
    monkeypatch.setattr(machine.hopper, "works_on", lambda device: False)
    assert not runs()["cuda:0", "Hopper"] and runs()["cuda:0", "Triton"]
    monkeypatch.setattr(machine, "compiler", lambda: "")
    assert not runs()["cuda:0", "Triton"] and "gcc" in machine.no_triton((9, 0))
    monkeypatch.setattr(machine, "find_spec", lambda _: None)
    assert "headscope[triton]" in machine.no_triton((9, 0))


def test_first_calls_are_held_to_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where the streaming engine answers: a wrong result, a fallback and an exception are faults."""
    from headscope.kernels import attention

    monkeypatch.setattr(machine, "ROWS", 24)
    assert [one.fault for one in machine.warm(["cpu"])] == [""] * 9
    right = attention.attend

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        result.entropy += 0.1
        machine.warnings.warn("triton.rows does not compile", EngineWarning, stacklevel=1)
        return result

    monkeypatch.setattr(attention, "attend", wrong)
    first = next(machine.warm(["cpu"]))
    assert "entropy is off by 1.0e-01" in first.fault and "does not compile" in first.fault
    monkeypatch.setattr(attention, "attend", lambda *_, **__: 1 / 0)
    assert "ZeroDivisionError" in next(machine.warm(["cpu"])).fault


def test_warm_without_a_card_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out = run(capsys, "--warm", "--json")
    said = [one["says"] for one in json.loads(out)["findings"] if one["about"] == "--warm"]
    assert code == 0 and len(said) == 1 and "no GPU" in said[0]


def test_the_shell_completes_commands() -> None:
    """What `--install-completion` puts into a shell's configuration calls the program like this."""
    code = "import sys; sys.argv = ['headscope']\nfrom headscope.interp.cli import main\nmain()"
    env = {"_HEADSCOPE_COMPLETE": "complete_bash", "COMP_WORDS": "headscope d", "COMP_CWORD": "1"}
    import os

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    assert done.stdout.split() == ["discover", "doctor"]
