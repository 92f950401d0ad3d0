"""What an edit of heads' outputs costs in generation, on SmolLM2-135M, a token.

Run: python interventions/benchmarks/generating.py --out interventions/benchmarks/results.json

Greedy generation of some tokens behind a prompt, with each edit and without, in turn (in the other order every second
round). A round's number is the median of the seconds between its tokens, the prompt's own pass left out; what is
reported is the median over the rounds of its ratio to the same round without an edit, with a 95 % bootstrap interval.
Layers that an edit names none of run the model's own attention.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headscope.interp import load_model
from headscope.interp.results.headset import HeadSet
from headscope.interventions import (
    AblateHeads,
    AddToHeads,
    AffineHeads,
    ClampHeads,
    Intervention,
    PatchHeads,
    ProjectHeads,
    ScaleHeads,
    apply,
)
from headscope.interventions.applying import size

MODEL, NONE = "smollm2-135m", "no edit"


def edits(lm: Any) -> dict[str, Intervention]:
    """Ten heads of ten layers by every edit, and every head of the model by one."""
    (layers, heads), width = size(lm), lm.info.d_head
    ten = HeadSet.of([(layer, layer % heads) for layer in range(layers - 10, layers)])
    every = HeadSet.of([(layer, head) for layer in range(layers) for head in range(heads)])
    table = 1e-3 * torch.randn(layers, heads, width, generator=torch.Generator().manual_seed(0))
    return {
        "scale, 10 heads": ScaleHeads(ten, 0.99),
        "ablate zero, 10 heads": AblateHeads(ten),
        "ablate resample, 10 heads": AblateHeads(ten, "resample", samples=table[:, :, None].repeat(1, 1, 8, 1)),
        "add, 10 heads": AddToHeads(ten, table),
        "project, 10 heads": ProjectHeads(ten, table),
        "clamp, 10 heads": ClampHeads(ten, table, high=0.1),
        "patch, 10 heads": PatchHeads(ten, table[:, :, None], positions=(5, 6)),
        "affine, every head": AffineHeads(every, A=table, v=table),
    }


class Stamps:
    """A logits processor that notes when each token is chosen."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.at.append(time.perf_counter())
        return scores


def per_token(lm: Any, ids: Tensor, tokens: int, edit: Intervention | None) -> float:
    """Median seconds between the tokens of one generation."""
    stamps, options = Stamps(), dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    with ExitStack() as stack:
        if edit is not None:
            stack.enter_context(apply(lm, edit))
        lm.model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[stamps], **options)
    return float(np.median(np.diff(stamps.at)))


def measure(prompt: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Every edit's ratio to no edit, round by round after one to warm up."""
    lm = load_model(MODEL)
    ids = torch.randint(0, lm.info.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    kinds: dict[str, Intervention | None] = {NONE: None, **edits(lm)}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name in list(kinds)[:: 1 if number % 2 else -1]:
            taken = per_token(lm, ids, tokens, kinds[name])
            if number:
                seconds[name].append(taken)
    plain = np.array(seconds[NONE])
    found: dict[str, Any] = {f"{NONE}, seconds a token": float(np.median(plain))}
    for name in edits(lm):
        ratio = np.array(seconds[name]) / plain
        drawn = np.random.default_rng(0).choice(ratio, (4000, rounds))
        interval = [float(x) for x in np.percentile(np.median(drawn, axis=1), [2.5, 97.5])]
        found[name] = {"ratio": float(np.median(ratio)), "interval": interval}
    return found


def main() -> None:
    """Measure, print as JSON, and write it with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    result = {"device": device, **vars(chosen), **measure(chosen.prompt, chosen.tokens, chosen.rounds)}
    text = json.dumps({name: x for name, x in result.items() if name != "out"}, indent=1)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
