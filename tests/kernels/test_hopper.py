"""The kernels for Hopper compile here for a card that is not here; ``test_hopper_emulated`` looks at their numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="the kernels for Hopper are written in Gluon")

from headscope.kernels.hopper import dispatch as hopper
from headscope.kernels.masks import Mask

SHARED = 227 * 1024  # bytes a block may have on an H100
SPILT = 8  # registers: bookkeeping; what a thread holds of a tile of scores are 64
SPILT_BY_32 = 16  # with 32 features and distances 13 do not fit
ALL, HOW = os.environ.get("HEADSCOPE_COMPILE") == "all", "three minutes of compiling: HEADSCOPE_COMPILE=all does it"
WITH_32 = range(1, 4)  # of the kernels in the order in which they are compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    "d, dtype, mask, features, count",
    [
        ("128", "bfloat16", "causal", "0,32", 7),
        pytest.param("64", "float16", "padded", "16", 6, marks=pytest.mark.skipif(not ALL, reason=HOW)),
    ],
)
def test_compile_within_what_the_card_has(
    d: str, dtype: str, mask: str, features: str, count: int, tmp_path: Path
) -> None:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("compile_hopper.py")), d, dtype, mask, features]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [line.rsplit(maxsplit=4) for line in done.stdout.splitlines() if line.endswith(("True", "False"))]
    assert len(kernels) == count
    for number, (name, shared, loops, stores, serialized) in enumerate(kernels):
        most = SPILT_BY_32 if number in WITH_32 else SPILT
        assert int(shared) <= SHARED, name
        assert int(loops) >= 2, f"{name}: every group has a loop over whole tiles"
        assert int(stores) <= most, f"{name}: a loop over whole tiles has no room for its registers"
        assert serialized == "False", f"{name}: ptxas runs its matrix products one after the other"


def test_what_they_do_not_take() -> None:
    q, k = torch.zeros(1, 2, 2048, 128, dtype=torch.bfloat16), torch.zeros(1, 1, 2048, 128, dtype=torch.bfloat16)
    assert not hopper.takes(q, k, k, mask=Mask.causal(), scale=0.1)  # no GPU


@pytest.mark.parametrize("strides, fits", [((1, 128), True), ((1, 124), False), ((0, 128), False), ((1, 136), True)])
def test_what_the_copy_engine_can_address(strides: tuple[int, int], fits: bool) -> None:
    head, row = strides
    storage = torch.zeros(2 * 64 * 256, dtype=torch.bfloat16)
    x = storage.as_strided((1, 2, 64, 96), (16384, 8192 * head, row, 1))
    assert hopper._fetchable(x) is fits
