"""How long every head method takes at its default size, from the command line, each in a process of its own.

Run: taskset -c 0,1 python interp/benchmarks/methods.py --out interp/benchmarks/results/methods.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from headscope.interp.heads import METHODS


def seconds(method: str, model: str, folder: str) -> float:
    """Wall time of one ``headscope discover``, the model's loading included.

    Raises:
        RuntimeError: what the command said where it failed.
    """
    command = [sys.executable, "-m", "headscope.interp.cli", "discover", method, "--model", model, "--out"]
    begin = time.perf_counter()
    done = subprocess.run([*command, f"{folder}/{method}"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method}: {done.stderr[-500:]}")
    return round(time.perf_counter() - begin, 1)


def main() -> None:
    """Time them one after the other, print as JSON, and write it with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = {method: seconds(method, asked.model, folder) for method in asked.methods}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = f"{cores} cores, {platform.machine()} CPU"
    text = json.dumps({"device": device, "model": asked.model, "seconds": found}, indent=1)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
