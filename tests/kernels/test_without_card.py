"""The Triton kernels compile for a card that is not here: every mask rule at one width, some at all of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the Triton engine is an optional extra")

from headscope.kernels.checks.cases import MASKS, WIDTHS


def compile_all(cache: pytest.TempPathFactory, *asked: str) -> str:
    """What a process of its own says: it replaces Triton's driver, and a compiler that crashes may take it down."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache.getbasetemp() / "triton")  # rules share kernels
    command = [sys.executable, "-m", "headscope.kernels.checks.without_card", *asked]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


EVERY = [kind for kind in MASKS if kind != "rule"]  # which is streaming's
SOME = ["causal", "chunks", "segments"]


@pytest.mark.slow
@pytest.mark.parametrize("width, kinds", [(f"{d}x{dv}", EVERY if d == 80 else SOME) for d, dv in WIDTHS])
def test_what_the_copy_engine_feeds_compiles(
    width: str, kinds: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The ptxas of Triton 3.4 to 3.6 crashed on the output under bare chunks and segments, at widths above 64.

    Every rule at every width is what ``python -m headscope.kernels.checks.without_card`` compiles, in half an hour.
    """
    asked = ("--rules", ",".join(kinds), "--widths", width, "--dtypes", "float16", "--calls", "output;columns")
    assert f"{len(kinds)} shapes, 0 kernels do not compile" in compile_all(tmp_path_factory, *asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, kinds, widths, shapes",
    [("float16", "window,chunks", "80,256", 4), ("bfloat16", "chunks", "256", 1), ("float32", "window", "80", 1)],
)
def test_every_kernel_compiles(
    dtype: str, kinds: str, widths: str, shapes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    said = compile_all(tmp_path_factory, "--rules", kinds, "--widths", widths, "--dtypes", dtype)
    assert f"{shapes} shapes, 0 kernels do not compile" in said
