"""The Triton kernels compile for a card that is not here: each rule of a mask at one width, some at the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the Triton engine is an optional extra")

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
