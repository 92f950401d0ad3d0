"""The benchmark of several GPUs, tried on two processes of a CPU: it compares a process by itself with both."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("what", ["heads", "text", "prompts"])
def test_a_dry_run_on_two_processes_compares_them_with_one(what: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = ["-m", "headscope.interp.benchmarks.scale", what, "--dry-run", "--alone", "--columns", "--dtype", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    if what == "prompts":
        assert found["prompts"] == 12 and found["processes"] == 2
        return
    assert found["dtype"] == "torch.float32" and len(found["cases"]) == 4
    apart = found["apart"]
    assert {"logsumexp", "entropy", "sink_mass", "span_mass", "key_mass"} < set(apart)
    for name, each in apart.items():  # 1e-5 of the largest value: see test_processes
        assert each["largest difference"] <= 1e-5 * max(1.0, each["largest"]), (name, each)
        assert each["largest"] > 0
