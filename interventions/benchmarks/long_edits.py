"""Peak memory and time of every edit of patterns at one layer of a long text, each in a process of its own.

    python interventions/benchmarks/long_edits.py --tokens 32768

A query x key tensor of one head is tokens^2 numbers: 4 GiB of float32 and 1 GiB of bool at 32,768 tokens. ``added`` is
what the process's peak grew by beyond the layer's inputs; ``plain`` is the layer without an edit.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.stream import StreamCall
from headscope.interventions import (
    BoostRecent,
    CalibrateAttention,
    ForcePattern,
    RedistributeSinks,
    ScaleSinks,
    SwapKeys,
)
from headscope.interventions.attention.pattern_edit import PatternEdit
from headscope.kernels.masks import Mask

D_HEAD, D_MODEL = 16, 64
EDITS: dict[str, PatternEdit | None] = {
    "plain": None,
    "sinks removed": ScaleSinks(),
    "sinks lost": ScaleSinks(renormalise=False),
    "sinks detected": ScaleSinks(detect=0.001),
    "calibrated": CalibrateAttention(threshold=0.001),
    "span (VAR)": RedistributeSinks(span=(100, 700), dimensions=(0, 1), tau=2.0, layers=(0,), least=0.0, rho=0.0),
    "swapped": SwapKeys(first=(10, 11), second=(500, 501)),
    "forced": ForcePattern(onto=(10, 20), strength=0.5),
    "recent": BoostRecent(previous="all"),
}


def peak() -> float:
    """MiB that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, tokens: int) -> dict[str, float | str]:
    """One edit of one layer of one head."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, D_HEAD) for _ in range(3))
    k[:, :, [0, 500]] *= 4.0  # sinks for half of the queries
    x = torch.randn(1, tokens, D_MODEL)
    AttentionCall(q[:, :, :64], k[:, :, :64], v[:, :, :64], Mask.causal(), 0.25, 0, "layers.*").output()
    call, edit, before = AttentionCall(q, k, v, Mask.causal(), 0.25, 0, "layers.*"), EDITS[name], peak()
    began = time.perf_counter()
    with torch.no_grad():
        if edit is not None:
            if edit.streams:
                edit.stream(StreamCall("resid_pre", 0, "layers.*", x, 0, lambda x: torch.arange(tokens)[None]))
            edited = edit.edit(call)
            assert edited is not call, f"{name} changed nothing"
            call = edited
        call.output()
    return {"edit": name, "added_mib": round(peak() - before, 1), "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--edits", nargs="+", choices=list(EDITS), default=list(EDITS))
    parser.add_argument("--here", action="store_true", help="measure the one edit in this process")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure(given.edits[0], given.tokens)))
        return
    for name in given.edits:
        command = [sys.executable, __file__, "--tokens", str(given.tokens), "--here", "--edits", name]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


if __name__ == "__main__":
    main()
