"""Seconds of the first call of each kind in a new process: Triton's cache empty, then filled, then of other lengths.

    python kernels/benchmarks/first_calls.py --out first-calls.json

Every number is of a process of its own, which has imported torch and reached the card, and nothing of headscope: the
call's imports count. In brackets: how long Triton takes to read its own files, which the first process does in a thread
beside our imports, and those after it need not (``first_call``). "other lengths" are lengths that no process asked for
before, and "built" how many kernels they added to the cache (none may). ``--without-card``: the host's part, for
kernels that compile for Hopper behind a driver that does nothing (``host_time``).
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEADS, KV_HEADS, D = 8, 2, 128
KINDS = (
    "rows",
    "rows + output",
    "columns",
    "columns + lse",
    "top keys",
    "targets",
    "spans",
    "divergence",
    "moved",
    "blocks",
)
LENGTH, OTHERS = 2048, (1100, 1264, 1601, 2047)
Calls = dict[str, Callable[[], Any]]


def calls(n: int, device: str) -> Callable[[str], Any]:
    """What makes the call of a kind over ``n`` tokens. Nothing of headscope is imported before it is called."""
    import torch

    gen = torch.Generator(device).manual_seed(0)
    shapes = ((1, HEADS, n, D), (1, KV_HEADS, n, D), (1, KV_HEADS, n, D))
    q, k, v = (torch.randn(s, generator=gen, device=device, dtype=torch.bfloat16) for s in shapes)
    lse = torch.zeros(1, HEADS, n, device=device)
    targets = torch.zeros(1, n, 1, dtype=torch.int64, device=device)
    few = torch.arange(n, device=device) < 1

    def call(kind: str) -> Any:
        from headscope.kernels import attention, columns, divergence, redistribute, redistribution, spans
        from headscope.kernels.blocks import blocks
        from headscope.kernels.masks import Mask
        from headscope.kernels.request import Columns, Request
        from headscope.kernels.scores import Scores

        scores = Scores(q, k, Mask.causal(), D**-0.5)
        with_lse = Request(output=False, columns=(Columns(sum=True),))
        ends = [(0, n // 2), (n // 2, n)]
        made: Calls = {
            "rows": lambda: attention.attend(scores, v, request=Request(output=False, lse=True, entropy=True)),
            "rows + output": lambda: attention.attend(scores, v, request=Request(lse=True, entropy=True)),
            "columns": lambda: columns.columns(scores, lse),
            "columns + lse": lambda: attention.attend(scores, v, request=with_lse),
            "top keys": lambda: attention.attend(scores, v, request=Request(output=False, top=16)),
            "targets": lambda: attention.attend(scores, v, request=Request(output=False, targets=targets)),
            "spans": lambda: spans.span_outputs(scores, v, ends),
            "divergence": lambda: divergence.divergence(scores, Scores(q, v, Mask.causal(), D**-0.5)),
            "moved": lambda: redistribute.redistribute(
                scores, v, redistribution.Redistribution(few, 0.5), request=Request()
            ),
            "blocks": lambda: blocks(scores, size=64, lse=lse),
        }
        return made[kind]()

    return call


def one(kind: str, lengths: list[int], without_card: bool) -> list[float]:
    """Seconds of Triton's reading of itself, then of the calls of ``kind`` over ``lengths``, in this process."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        if without_card:
            os.environ["TRITON_INTERPRET"] = "0"
            from headscope.kernels.benchmarks import host_time

            host_time.load_driver(Path(folder))
        took: list[float] = []
        for n in lengths:
            call = calls(n, "cpu" if without_card else "cuda")
            _wait(torch)
            began = time.perf_counter()
            if without_card and not took:
                host_time.pretend()  # by the imports that the call needs
            call(kind)
            _wait(torch)
            took.append(time.perf_counter() - began)
    from headscope.kernels.first_call import triton_key

    began = time.perf_counter()
    inspect.unwrap(triton_key())()
    return [time.perf_counter() - began, *took]


def _wait(torch: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def elsewhere(kind: str, lengths: list[int], without_card: bool, cache: str) -> list[float]:
    """``one`` in a process of its own."""
    command = [sys.executable, __file__, "--one", kind, "--lengths", *map(str, lengths)]
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # who installs a package compiles it to bytecode
    command += ["--without-card"] * without_card
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind}: {done.stderr[-2000:]}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def built(cache: str) -> int:
    """How many kernels are in the cache."""
    return len(list(Path(cache).glob("*/*.cubin")))


def main() -> None:
    """Parse the command line, measure, and say so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--without-card", action="store_true")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--lengths", nargs="+", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.lengths, args.without_card)))
        return
    from headscope.kernels.benchmarks.pages import machine

    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        for kind in args.kinds:
            _, empty = elsewhere(kind, [LENGTH], args.without_card, cache)
            itself, filled = elsewhere(kind, [LENGTH], args.without_card, cache)
            before = built(cache)
            _, *others = elsewhere(kind, list(OTHERS), args.without_card, cache)
            table[kind] = {"empty": empty, "filled": filled, "hash of Triton": itself, "others": others}
            table[kind]["built"] = built(cache) - before
            first, *rest = (f"{x:.2f}" for x in others)
            print(
                f"{kind:<14} {empty:6.2f} s, cache filled {filled:5.2f} s ({itself:.2f}); others {first} s, then "
                f"{', '.join(rest)}; {table[kind]['built']} kernels built",
                flush=True,
            )
    if args.out is not None:
        about = {"kind": "first calls", "machine": machine(), "without card": args.without_card}
        args.out.write_text(json.dumps({**about, "calls": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
