"""What tracing adds to a token of ``generate``, batch 1: in no layer, one, all, or only attached.

    python interp/benchmarks/generation.py --device cuda --shape 1b --out interp/benchmarks/results/h200-generation.json
    python interp/benchmarks/generation.py --device cuda --shape 1b --cache static      # as transformers compiles it
    python interp/benchmarks/generation.py --device cpu --shape smollm2-135m

Ways of generating are run in turn, in the other order every second round, after a round that is dropped; a token's time
is that of ``--new`` tokens less that of one, over their number. Printed are the median over rounds and of the rounds'
ratios to untraced, in wall time on a card and in processor time of one thread without (other work disturbs it less).
"attached" is a handler that does nothing in every layer, "idle" one that is concerned with none. ``thin`` is
SmolLM2-135M's depth and heads, eight numbers a head: the interpreter runs the same lines, and arithmetic does not hide
them. With ``--cache static`` on a card ``generate`` compiles the untraced step and captures it in CUDA graphs; an
attached block runs it as plain Python, but for steps that are only traced, which become graphs of ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics as stats
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headscope.interp import load_model, trace
from headscope.interp.benchmarks.attaching import UNTRACED, Kinds, kinds_of
from headscope.interp.benchmarks.shapes import SHAPES, Shape, random_model
from headscope.interp.statistics import Entropy

THIN = Shape(30, 72, 8, 9, 3, 64, True, tokens=4096)


def ways(model: Any) -> Kinds:
    """The ways to generate."""
    return {
        **kinds_of(model),
        "layers=[]": partial(trace, model, Entropy(), layers=[]),
        "entropy, one layer": partial(trace, model, Entropy(), layers=[0]),
        "entropy, all layers": partial(trace, model, Entropy()),
    }


def taken(model: Any, ids: torch.Tensor, new: int, cache: str | None) -> float:
    """Seconds of generating ``new`` tokens."""
    clock = time.perf_counter if ids.is_cuda else time.process_time
    if ids.is_cuda:
        torch.cuda.synchronize()
    began = clock()
    options = {} if cache is None else {"cache_implementation": cache}
    model.generate(ids, do_sample=False, min_new_tokens=new, max_new_tokens=new, **options)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return clock() - began


def rounds(model: Any, ids: torch.Tensor, *, new: int, count: int, cache: str | None) -> dict[str, list[float]]:
    """Seconds a token of every way in every round."""
    found: dict[str, list[float]] = {name: [] for name in ways(model)}
    for number in range(count + 1):
        for name, way in list(ways(model).items())[:: 1 if number % 2 else -1]:
            with way():
                one, all_ = (taken(model, ids, n, cache) for n in (1, new))
            if number:
                found[name].append((all_ - one) / (new - 1))
    return found


def made(shape: str, tokens: int, device: str) -> Any:
    """The model of a name: a published shape with random weights, or one that ``load_model`` knows."""
    if shape in (*SHAPES, "thin"):
        model = random_model(THIN if shape == "thin" else SHAPES[shape], tokens, device)
    else:
        model = load_model(shape).model.to(device)
    model.generation_config.eos_token_id = None
    return model.float() if device == "cpu" else model.to(torch.bfloat16)


def main() -> None:
    """Parse the command line, measure, print, and write JSON with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default="1b", help="thin, a shape of shapes.py, or a name for load_model")
    parser.add_argument("--cache", choices=("static",), help="a kind of transformers'; its default is dynamic")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    model = made(args.shape, args.prompt + args.new, args.device)
    ids = torch.randint(4, model.config.vocab_size, (1, args.prompt), device=args.device)
    found = rounds(model, ids, new=args.new, count=args.rounds, cache=args.cache)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU, one thread"
    result: dict[str, Any] = {"device": f"{name}, torch {torch.__version__}", "shape": args.shape, "ways": {}}
    result |= {"cache": args.cache or "dynamic", "prompt": args.prompt, "new": args.new}
    for way, times in found.items():
        ratio = stats.median(mine / plain for mine, plain in zip(times, found[UNTRACED], strict=True))
        result["ways"][way] = {"ms a token": 1000 * stats.median(times), "ratio": ratio}
        print(f"{way:<22} {1000 * stats.median(times):8.3f} ms a token  {ratio:5.2f}x", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
