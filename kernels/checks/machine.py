"""Which engines answer a call on this machine, and what their kernels say of a first call: ``headscope doctor``.

Importing it imports no Triton. What it does not show: that every mask, width and precision compiles; that is
``kernels/benchmarks/gpu.py --check``, which takes minutes.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from headscope.kernels.fallback import EngineWarning, first_line
from headscope.kernels.hopper import dispatch as hopper

if TYPE_CHECKING:
    from headscope.kernels.checks.cases import Case
    from headscope.kernels.request import Request

LOWEST = (8, 0)  # the compute capability below which Triton does not say that it works
ROWS = 1100  # of a call that Hopper's kernels take: more than they ask for, and no multiple of a tile
INTERPRETER = "TRITON_INTERPRET"


@dataclass(frozen=True)
class Engine:
    """An engine on one device: whether calls there go to it, and which, or why none does."""

    device: str
    name: str
    runs: bool
    says: str


@dataclass(frozen=True)
class Warmed:
    """A first call: seconds with its compilation, and what was wrong with it ("" if nothing)."""

    device: str
    call: str
    seconds: float
    fault: str


def cards() -> list[dict[str, Any]]:
    """The GPUs that torch sees: ``device``, ``name``, ``capability`` ("9.0"), ``memory`` in bytes."""
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        about = torch.cuda.get_device_properties(index)
        capability = f"{about.major}.{about.minor}"
        one = {"device": f"cuda:{index}", "name": about.name, "capability": capability, "memory": about.total_memory}
        found.append(one)
    return found


def engines() -> list[Engine]:
    """The engines of every device, the one that is asked first before the one that it falls back to."""
    found = []
    for card in cards():
        device = card["device"]
        major, minor = map(int, card["capability"].split("."))
        why = no_triton((major, minor))
        found.append(_hopper(device, major, why))
        says = why or "half and single precision, heads up to 256 wide, every mask but a rule of Python's"
        found.append(Engine(device, "Triton", not why, says))
        says = "scores that an edit changes, by a kernel that torch compiles when it is first needed"
        found.append(Engine(device, "FlexAttention", True, says))
        found.append(Engine(device, "streaming", True, "all else: plain PyTorch, needs no compiler"))
    everything = "every call: plain PyTorch, in blocks, no map"
    return [*found, Engine("cpu", "streaming", True, everything)]


def no_triton(capability: tuple[int, int]) -> str:
    """Why Triton's kernels do not run on a card of this compute capability; "" if they do."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'headscope[triton]'"
    try:
        import_module("triton")
    except Exception as error:  # a broken installation says it in many ways
        return f"triton cannot be imported ({type(error).__name__}: {first_line(error)})"
    if torch.version.hip is None and not compiler():
        return "there is no C compiler, which Triton needs: install gcc, or name one in CC"
    if torch.version.hip is None and capability < LOWEST:
        return f"Triton asks for compute capability {LOWEST[0]}.{LOWEST[1]}"
    return ""


def compiler() -> str:
    """The C compiler that Triton would call; "" if there is none."""
    names = (os.environ.get("CC"), "gcc", "clang", "cc")
    return next((path for name in names if name and (path := shutil.which(name))), "")


def interpreted() -> bool:
    """Whether Triton is told to interpret its kernels, as tests without a card do."""
    return os.environ.get(INTERPRETER, "0").lower() in ("1", "true", "on", "y", "yes")


def _hopper(device: str, major: int, why: str) -> Engine:
    if not why and major != 9:
        why = "written for compute capability 9 (H100, H200)"
    if not why and not hopper.works_on(torch.device(device)):
        why = "Gluon cannot be imported from this Triton: another version of triton may"
    says = f"half precision, heads {hopper.NARROWEST} to {hopper.WIDEST} wide, {hopper.FEWEST} queries and more"
    return Engine(device, "Hopper (Gluon)", not why, why or says)


def warm(devices: list[str]) -> Iterator[Warmed]:
    """First calls of the engines on ``devices``, held to the float64 definition; compiled kernels stay in Triton's
    cache, so that the next process does not wait for them."""
    for device in devices:
        for name, call in _calls(device):
            yield _timed(device, name, call)


def _calls(device: str) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    from headscope.kernels.checks.cases import everything, random_case

    def one(**spec: Any) -> Callable[[], list[str]]:
        def run() -> list[str]:
            case = random_case(**spec, device=device)
            return _wrong(case, everything(case, features=0))

        return run

    half = {"dtype": torch.bfloat16, "queries": ROWS, "keys": ROWS, "batch": 1}
    for kind in ("causal", "window", "left padding"):
        for d in (64, 128):
            yield f"a prompt, {kind}, bfloat16, heads {d} wide", one(kind=kind, d_head=d, **{**half, "batch": 2})
    yield "a prompt, causal, bfloat16, heads 256 wide", one(kind="causal", d_head=256, **half)
    yield "a prompt, causal, float32, heads 64 wide", one(kind="causal", d_head=64, queries=257, keys=257)
    yield "a token, causal, bfloat16, heads 128 wide", one(kind="causal", d_head=128, **{**half, "queries": 1})


def _wrong(case: Case, request: Request) -> list[str]:
    """The results of a call that are further off than rounding explains, as lines."""
    from headscope.kernels.attention import attend
    from headscope.kernels.checks.compare import compare

    got = case.run(attend, request)
    return [
        f"{one.name} is off by {one.error:.1e}, allowed {one.allowed:.1e}"
        for one in compare(got, case, request)
        if not one.holds
    ]


def _timed(device: str, name: str, call: Callable[[], list[str]]) -> Warmed:
    began, faults = time.perf_counter(), []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", EngineWarning)
        try:
            faults = call()
        except Exception as error:  # whatever a card says: the next call is tried as well
            faults = [f"{type(error).__name__}: {first_line(error)}"]
    faults += [str(one.message) for one in said if issubclass(one.category, EngineWarning)]
    return Warmed(device, name, time.perf_counter() - began, "; ".join(faults))
