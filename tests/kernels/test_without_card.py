"""The Triton kernels compile for a card that is not here: each rule of a mask at one width, some at the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton engine is an optional extra")

from headscope.kernels import attention, first_call
from headscope.kernels.benchmarks import edit_loops, first_calls
from headscope.kernels.checks import machine
from headscope.kernels.hopper import dispatch
from headscope.kernels.masks import Mask
from headscope.kernels.triton import device

COMPILE = """
import json, sys
from headscope.kernels.checks.without_card import main
sys.exit(max([main(asked) for asked in json.loads(sys.argv[1])]))
"""
# rules, widths, precision and calls, as for ``headscope.kernels.checks.without_card``
Asked = tuple[str, str, str, str]


def compile_all(cache: pytest.TempPathFactory, asked: list[Asked]) -> list[str]:
    """What a process of its own says: it replaces Triton's driver, and a compiler that crashes may take it down."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache.getbasetemp() / "triton")  # rules share kernels
    options = ("--rules", "--widths", "--dtypes", "--calls")
    lines = json.dumps([[word for pair in zip(options, one, strict=True) for word in pair] for one in asked])
    command = [sys.executable, "-c", COMPILE, lines]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout.splitlines()


FED = ("float16", "output;columns")
TERMS = "causal,full,window,future,left padding,right padding,chunks,chunks from origin,segments"
BARE = "chunks,segments"


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked, shapes",
    [
        ([(TERMS, "80x80", *FED)], [9]),
        ([("causal", "16x16,60x60,64x64,128x64", *FED), (BARE, "96x128,128x128,256x256", *FED)], [4, 6]),
    ],
    ids=["rules", "widths"],
)
def test_what_the_copy_engine_feeds_compiles(
    asked: list[Asked], shapes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The ptxas of Triton 3.4 to 3.6 crashed on the output under bare chunks and segments, at widths above 64.

    Every rule at every width is what ``python -m headscope.kernels.checks.without_card`` compiles, in half an hour.
    """
    said = compile_all(tmp_path_factory, asked)
    assert [line.split(": ")[1] for line in said] == [f"{count} shapes, 0 kernels do not compile" for count in shapes]


@pytest.mark.slow
def test_every_kernel_compiles(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In float32, where kernels take longest to compile, not those of which "fused" holds all."""
    few = "output;fused;one query;columns;top keys;blocks;divergence"
    asked = [("window", "80", "float16", ""), ("chunks", "256", "bfloat16", ""), ("window", "80", "float32", few)]
    said = compile_all(tmp_path_factory, asked)
    assert [line.split(": ")[1] for line in said] == ["1 shapes, 0 kernels do not compile"] * 3


@pytest.mark.slow
def test_a_score_edit_adds_few_instructions(tmp_path: Path) -> None:
    """A slope is a difference of positions and a multiply-add, a bias by distance a load; both forbid to fold the scale
    into the exponent, which is a multiplication. What tells a hidden key once made it twenty."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = ["--edits", "slope;bias by distance", "--what", "statistics;columns", "--out", str(tmp_path / "loops")]
    subprocess.run([sys.executable, edit_loops.__file__, *asked], env=environment, check=True, timeout=300)
    for loop in json.loads((tmp_path / "loops").read_text())["loops"]:
        assert loop["a pair"] - loop["without"] < 4 and not loop["spills"], loop


@pytest.mark.slow
def test_one_compiled_kernel_serves_every_length(tmp_path: Path) -> None:
    """Triton compiles anew for a size that is 1 or a multiple of 16, also in tuples, if it is told of it."""
    if not machine.compiler():
        pytest.skip("the driver that does nothing needs a C compiler")
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        first_calls.__file__,
        "--without-card",
        "--kinds",
        "targets",
        "--out",
        str(tmp_path / "x"),
    ]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "x").read_text())["calls"]["targets"]
    assert found["built"] == 0 and found["filled"] < found["empty"]


def test_what_a_kernel_is_compiled_for_has_no_lengths() -> None:
    """Every whole number that a kernel is given in a tuple is a length, which it is not compiled for, or stays the same
    for a model and what is asked of it."""
    from headscope.kernels.triton import blocks, columns, divergence, heaviest, masks, rows, targets, topk

    stay = {"heads", "group", "width", "repeat", "together", "top", "each", "batch", "chunk"}
    sizes = [x.Sizes for x in (blocks, columns, divergence, heaviest, rows, targets, topk)]
    numbers = {name for kind in sizes for name in kind._fields}
    numbers |= {name for name, what in masks.Rules.__annotations__.items() if "int" in str(what)}
    assert numbers == device.LENGTHS | stay
    for one, other in ((16, 17), (1, 4096), (0, 31)):
        kinds = [kind(*(one if name in device.LENGTHS else 4 for name in kind._fields)) for kind in sizes]
        others = [kind(*(other if name in device.LENGTHS else 4 for name in kind._fields)) for kind in sizes]
        assert [device.any_length(x) for x in kinds] == [device.any_length(x) for x in others]
    assert device.any_length(1) == device.any_length(48) != device.any_length(1 << 40) == 1 << 40
    assert device.any_length(masks.rules(Mask.causal(16), 1)) == device.any_length(masks.rules(Mask.causal(3), 1))


@pytest.mark.slow
def test_what_a_first_call_waits_for_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton hashes 400 MB of its own once, and the hash is kept for the next process."""
    monkeypatch.setattr(first_call, "suppress", lambda *_: nullcontext())  # nothing failed unseen
    monkeypatch.setattr(dispatch, "works_on", lambda _: True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    attention._prepare(torch.device("cuda"))
    assert first_call._kept().read_text() == first_call.triton_key()()
