"""Memory of measuring a policy for a cache on a long text, above that of the untraced pass.

    OMP_NUM_THREADS=4 python -m headscope.interp.benchmarks.cache_memory --layers 2 \\
        --out interp/benchmarks/results/cache-memory.json

Every case runs in a process of its own. On a CPU the peak of its resident memory (``ru_maxrss``) is read at its end,
with ``--device cuda`` the peak of what torch allocated on the card. The text is random tokens. ``--layers`` keeps the
model's first so many layers: time grows with them, the peak is a layer's.

    python -m headscope.interp.benchmarks.cache_memory --tokens 131072 --device cuda --dtype bfloat16 \\
        --policies h2o,snapkv,streaming_llm --out interp/benchmarks/results/cache-memory-h200.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from headscope.interp.cache import lose
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.measured import hardware
from headscope.kernels.benchmarks.pages import machine

UNTRACED = "untraced"


def cut(name: str, layers: int, tokens: int, device: str, dtype: str) -> LanguageModel:
    """A model's first ``layers`` layers (0: all), allowed to read ``tokens``, more than it was trained for if need be:
    what it says of them is not asked."""
    lm = load_model(name, device=device, dtype=dtype)
    model = lm.inner
    model.config.max_position_embeddings = max(tokens, model.config.max_position_embeddings)
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return LanguageModel.wrap(model, lm.tokenizer, name=f"{name}, {layers or 'all'} layers")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """One case in this process: seconds, its peak in MiB, and the mean recall."""
    lm = cut(given.model, given.layers, given.tokens, given.device, given.dtype)
    if given.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(3, 40_000, (given.tokens,), generator=torch.Generator().manual_seed(0))
    begin, found = time.perf_counter(), None
    if given.case == UNTRACED:
        lm.forward(ids[None], logits=1)
    else:
        found = lose(lm, given.case, [given.budget], [ids], answer=given.answer, progress=False)
    seconds = time.perf_counter() - begin
    if given.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {"case": given.case, "seconds": round(seconds, 1), "peak_mib": round(peak)}
    return row if found is None else {**row, "recall": round(float(found.per_prompt().mean()), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--policies", default="h2o", help="each is a case")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--case", help="run this one here")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(run(given)))
        return
    rows = []
    for case in (UNTRACED, *given.policies.split(",")):
        command = [sys.executable, "-m", "headscope.interp.benchmarks.cache_memory", *sys.argv[1:], "--case", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        rows[-1]["above_untraced_mib"] = rows[-1]["peak_mib"] - rows[0]["peak_mib"]
        print(json.dumps(rows[-1]), flush=True)
    if given.out:
        settings = {key: value for key, value in vars(given).items() if key not in ("out", "case")}
        document = {
            "rows": rows,
            "settings": settings,
            "machine": machine() | {"device": hardware(given.device)},
            "command": " ".join(sys.argv[1:]),
        }
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
