"""What an edit of heads' outputs costs in generation, on SmolLM2-135M, a token.

Run: python interventions/benchmarks/generating.py --out interventions/benchmarks/results/generating.json

Greedy generation behind a prompt, with each edit and without, in turn (in the other order every second round); the
prompt's own pass is left out, and layers that an edit names none of run the model's own attention. Two measurements, as
in interp/benchmarks/attaching.py, because the cost is below a forward pass's own variation:

1. The cost itself: seconds that an edit adds to a token of a *thin* model, of the same depth and heads but a few
   dimensions wide, where the interpreter runs the same lines and arithmetic does not hide them: the median over rounds
   of the difference of the rounds' fastest tokens. Its share is that over the real model's fastest unedited token, the
   least favourable.
2. The ratio of the real model's median token with an edit to that without, round by round: the median over the rounds
   with a 95 % bootstrap interval. A busy machine makes it wide.
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
from headscope.interp.benchmarks.attaching import thin
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
    """Ten heads of ten layers by every edit, and every head of the model by two."""
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
        "clamp, every head": ClampHeads(every, table, high=0.1),
    }


class Stamps:
    """A logits processor that notes when each token is chosen."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.at.append(time.perf_counter())
        return scores


def per_token(lm: Any, prompt: int, tokens: int, edit: Intervention | None) -> list[float]:
    """Seconds between the tokens of one generation."""
    ids = torch.randint(0, lm.info.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    stamps, options = Stamps(), dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    with ExitStack() as stack:
        if edit is not None:
            stack.enter_context(apply(lm, edit))
        lm.model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[stamps], **options)
    return [float(x) for x in np.diff(stamps.at)]


def in_turn(lm: Any, prompt: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds by kind: (round, token), after a round to warm up."""
    kinds: dict[str, Intervention | None] = {NONE: None, **edits(lm)}
    seconds: dict[str, list[list[float]]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name in list(kinds)[:: 1 if number % 2 else -1]:
            taken = per_token(lm, prompt, tokens, kinds[name])
            if number:
                seconds[name].append(taken)
    return {name: np.array(taken) for name, taken in seconds.items()}


def measure(prompt: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Both measurements of every edit."""
    lm = load_model(MODEL)
    real = in_turn(lm, prompt, tokens, rounds)
    small = load_model(thin(lm.model))
    small.model.generation_config.eos_token_id = None
    bare = in_turn(small, prompt, 4 * tokens, 2 * rounds)
    plain, fastest = real.pop(NONE), bare.pop(NONE).min(1)
    added = {name: float(np.median(x.min(1) - fastest)) for name, x in bare.items()}
    return {
        f"{NONE}, milliseconds a token": {"median": 1e3 * float(np.median(plain)), "fastest": 1e3 * float(plain.min())},
        "microseconds added to a token": {name: 1e6 * x for name, x in added.items()},
        "share of the fastest unedited token": {name: x / float(plain.min()) for name, x in added.items()},
        "ratio of median tokens": {name: ratio(np.median(x, 1) / np.median(plain, 1)) for name, x in real.items()},
    }


def ratio(by_round: Any) -> dict[str, Any]:
    """The median of the rounds' ratios, and its interval."""
    drawn = np.random.default_rng(0).choice(by_round, (4000, len(by_round)))
    interval = [float(x) for x in np.percentile(np.median(drawn, axis=1), [2.5, 97.5])]
    return {"ratio": float(np.median(by_round)), "interval": interval}


def main() -> None:
    """Measure, print as JSON, and write it with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    asked = {"prompt": chosen.prompt, "tokens": chosen.tokens, "rounds": chosen.rounds}
    text = json.dumps({"device": device, **asked, **measure(**asked)}, indent=1)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
