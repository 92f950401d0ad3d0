"""What attaching costs where nothing is read, on SmolLM2-135M.

Run: python interp/benchmarks/attaching.py --out interp/benchmarks/results/attaching.json

Two measurements, because the cost is far below a forward pass's own variation:

1. The cost itself: seconds that attaching adds to a decoding step of a *thin* model, of the same depth and heads but a
   few dimensions wide. The interpreter runs the same lines there, once a layer, and arithmetic does not hide them.
   Kinds are run in turn within a round; the cost is the median over rounds of the difference of the rounds' fastest
   steps, and its share is that over the real model's fastest untraced step, which is the least favourable.
2. The ratio of attached to untraced passes of the real model, in turn: a decoding step (one token on a cache) and a
   prompt. The medians of the rounds' ratios, with 95 % bootstrap intervals.

Entering and leaving the block is timed apart: it is paid once, not for every pass.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics as stats
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from headscope.interp import load_model
from headscope.interp.attention.handler import Handler
from headscope.interp.sites import attached
from headscope.interp.sites.compiled import uncompiled
from headscope.interp.sites.huggingface import route as huggingface

MODEL = "smollm2-135m"
UNTRACED = "untraced"
Kinds = dict[str, Callable[[], AbstractContextManager[Any]]]


def kinds_of(model: Any) -> Kinds:
    """The ways to run a forward pass: none of ours, a handler that does nothing, one that is concerned with no layer.

    The last is what a tracer costs in the layers that it does not read; a tracer of no layer is not even attached.
    """
    return {
        UNTRACED: nullcontext,
        "attached": lambda: attached(model, Handler()),
        "idle": lambda: _idle(model),
    }


@contextmanager
def _idle(model: Any) -> Iterator[None]:
    with uncompiled(), huggingface.attached(model, _Idle()):
        yield


class _Idle(Handler):
    """Concerned with no layer, at a site that leaves all of them to the model's own attention."""

    def concerns(self, module: str, layer: int) -> bool:
        """No layer."""
        return False


def thin(model: Any) -> Any:
    """A random model of the same class, depth and heads whose arithmetic takes next to no time."""
    sizes = {"hidden_size": 8 * model.config.num_attention_heads, "head_dim": 8, "intermediate_size": 8}
    config = type(model.config)(**{**model.config.to_dict(), **sizes, "vocab_size": 64})
    return type(model)(config).eval()


def seconds(
    model: Any, *, tokens: int, past: int, rounds: int, passes: int, only: Sequence[str] | None = None
) -> dict[str, list[list[float]]]:
    """Seconds of forward passes over ``tokens`` tokens behind ``past`` cached ones: kind -> round -> pass.

    Kinds alternate within a round, in the other order every second round; a first round warms up and is dropped.
    """
    kinds = {name: kind for name, kind in kinds_of(model).items() if only is None or name in only}
    found: dict[str, list[list[float]]] = {name: [] for name in kinds}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, past + tokens), generator=generator)
    cache = DynamicCache(config=model.config)
    if past:
        with torch.no_grad():
            model(input_ids=ids[:, :past], past_key_values=cache, logits_to_keep=1)
    for number in range(rounds + 1):
        for name in list(kinds)[:: 1 if number % 2 else -1]:
            with torch.no_grad(), kinds[name]():
                taken = [_timed(model, ids[:, past:], cache if past else None) for _ in range(passes)]
            if past:
                cache.crop(-passes * tokens)
            if number:
                found[name].append(taken)
    return found


def _timed(model: Any, ids: torch.Tensor, cache: Any) -> float:
    begin = time.perf_counter()
    model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    return time.perf_counter() - begin


def cost(model: Any, *, past: int = 64, rounds: int = 40, passes: int = 8) -> dict[str, float]:
    """Seconds that each kind adds to a decoding step of ``model``: the median difference of rounds' fastest steps."""
    found = seconds(thin(model), tokens=1, past=past, rounds=rounds, passes=passes)
    fastest = {name: np.array([min(steps) for steps in of_kind]) for name, of_kind in found.items()}
    return {name: float(np.median(fastest[name] - fastest[UNTRACED])) for name in found if name != UNTRACED}


def fastest_step(model: Any, *, past: int = 512, steps: int = 20) -> float:
    """Seconds of the fastest untraced decoding step of ``model``."""
    return min(seconds(model, tokens=1, past=past, rounds=1, passes=steps, only=[UNTRACED])[UNTRACED][0])


def ratios(model: Any, *, tokens: int, past: int, rounds: int, passes: int) -> dict[str, Any]:
    """Median seconds untraced, and each kind's median ratio to it over the rounds with its 95 % interval."""
    found = seconds(model, tokens=tokens, past=past, rounds=rounds, passes=passes)
    medians = {name: np.array([stats.median(taken) for taken in of_kind]) for name, of_kind in found.items()}
    result: dict[str, Any] = {f"{UNTRACED}, seconds": float(np.median(medians[UNTRACED]))}
    for name in medians:
        if name != UNTRACED:
            ratio = medians[name] / medians[UNTRACED]
            result[name] = {"ratio": float(np.median(ratio)), "interval": _interval(ratio)}
    return result


def _interval(values: Any, resamples: int = 4000) -> list[float]:
    drawn = np.random.default_rng(0).choice(values, (resamples, len(values)))
    return [float(bound) for bound in np.percentile(np.median(drawn, axis=1), [2.5, 97.5])]


def entering(model: Any, repeats: int = 9) -> dict[str, float]:
    """Median seconds to enter and leave a block in which nothing runs (the model is verified already)."""
    taken: dict[str, list[float]] = {}
    for name, context in [*kinds_of(model).items()] * repeats:
        begin = time.perf_counter()
        with context():
            pass
        taken.setdefault(name, []).append(time.perf_counter() - begin)
    return {name: stats.median(times) for name, times in taken.items() if name != UNTRACED}


def attach(model: Any, rounds: int = 40) -> dict[str, Any]:
    """All of it, for results.json."""
    added = cost(model)
    step = fastest_step(model)
    layers = model.config.num_hidden_layers
    return {
        "microseconds added to a decoding step": {name: 1e6 * value for name, value in added.items()},
        "microseconds added a layer": {name: 1e6 * value / layers for name, value in added.items()},
        "share of the fastest untraced step": {name: value / step for name, value in added.items()},
        "decoding step after 512 tokens": ratios(model, tokens=1, past=512, rounds=rounds, passes=8),
        "prompt of 512 tokens": ratios(model, tokens=512, past=0, rounds=rounds, passes=1),
        "seconds to enter and leave": entering(model),
    }


def main() -> None:
    """Measure and print as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    text = json.dumps({"device": device, **attach(load_model(MODEL).model, asked.rounds)}, indent=1)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
