"""What tracing costs end to end at long context: a Llama of random weights, bfloat16, logits of the last token only.

    python -m headscope.interp.benchmarks.long_context --shape 8b --out kernels/benchmarks/results
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \\
        python -m headscope.interp.benchmarks.long_context --shape 1b --repeats 1 --out kernels/benchmarks/results

Cases take turns, after one pass each that warms up (two chunks of it, where a prompt is read in chunks) and is not
counted. Medians are over ``--repeats``. Memory is the peak of ``torch.cuda.max_memory_allocated`` during the passes;
the record is put together in host memory afterwards, timed apart. ``untraced`` is SDPA as transformers calls it
or, for a prompt in chunks, SDPA's bottom-right causal kernel: transformers would make a (chunk, tokens) mask there.
Row statistics are logsumexp, entropy, sink mass, distance and the masses of three spans, of every query unless the case
says otherwise. ``key bias`` edits every layer (a random bias of every key) and records nothing. Every traced pass is
checked (``checks.py``); a few milliseconds of that are in the times. A case that fails is reported, and the file is
written again after every pass.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from headscope.interp import trace
from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.benchmarks.checks import OneQuery, compare, compare_logits
from headscope.interp.benchmarks.shapes import SHAPES, Shape, estimate, random_model
from headscope.interp.sites import attached
from headscope.interp.sites.huggingface.switch import implementations, restore, switch
from headscope.interp.sites.unwrap import model_device
from headscope.interp.statistics import Distance, Entropy, KeyMass, LogSumExp, SinkMass, SpanMass, Statistic
from headscope.interp.statistics.queries import Every
from headscope.kernels.benchmarks.pages import machine, page, save

EVERY = 4
SPARSE = f"rows, every {EVERY}th query"
EDITED = "key bias"
VALUES = 7  # float32 numbers that `rows` keeps a query and head
LIBRARY = "headscope-benchmark-library"


def rows(tokens: int) -> list[Statistic]:
    """The row statistics that are traced; the spans are eighths of the prompt."""
    spans = {name: (n * tokens // 8, (n + 1) * tokens // 8) for name, n in (("first", 0), ("middle", 4), ("last", 7))}
    return [LogSumExp(), Entropy(), SinkMass(4), Distance(), SpanMass(spans)]


@contextmanager
def library(model: nn.Module) -> Iterator[None]:
    """SDPA with queries at the end of the keys and no mask tensor: what chunks cost untraced."""

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        bias: Any = causal_lower_right(q.shape[2], k.shape[2])
        z = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=kwargs.get("scaling"), enable_gqa=True)
        return z.transpose(1, 2).contiguous(), None

    before = implementations(model)
    switch(model, LIBRARY, attend, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        restore(before, LIBRARY)


class Biased(Handler):
    """Adds a random bias to every key's score, in every layer."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.bias = torch.randn(1, 1, tokens, generator=torch.Generator(device).manual_seed(0), device=device)

    def edit(self, call: AttentionCall) -> AttentionCall:
        return call.with_key_bias(self.bias[..., : call.key.shape[2]])


def cases(model: nn.Module, tokens: int, *, chunked: bool) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """How a pass is run, by name."""
    chosen = rows(tokens)
    return {
        "untraced": lambda: library(model) if chunked else nullcontext(),
        "attached": lambda: attached(model, Handler()),
        "rows": lambda: trace(model, chosen),
        SPARSE: lambda: trace(model, chosen, queries=Every(EVERY)),
        "rows and columns": lambda: trace(model, [*chosen, KeyMass()]),
        EDITED: lambda: attached(model, Biased(tokens, model_device(model))),
    }


@torch.no_grad()
def forward(model: nn.Module, ids: Tensor, chunk: int) -> Tensor:
    """Logits (vocabulary,) of the last token, the prompt read in one piece or through a cache, chunk by timed chunk."""
    if chunk >= ids.shape[1]:
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        return logits
    cache, begin = DynamicCache(config=model.config), time.perf_counter()
    for first in range(0, ids.shape[1], chunk):
        part = ids[:, first : first + chunk]
        logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float()
        if ids.is_cuda:
            torch.cuda.synchronize()
        print(f"  {first + part.shape[1]:,} tokens after {time.perf_counter() - begin:.2f} s", flush=True)
    return logits


class Clock:
    """Seconds and peak bytes of a block that runs on ``device``."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"

    def __enter__(self) -> Clock:
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.begin = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.gpu:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.begin
        self.peak = torch.cuda.max_memory_allocated() if self.gpu else None


class Benchmark:
    """One model and prompt; ``turn`` runs a case once and takes down what it gave in ``result``."""

    def __init__(self, shape: str, tokens: int, chunk: int, device: str) -> None:
        self.shape: Shape = SHAPES[shape]
        self.chunk, self.device, self.tokens = chunk, device, tokens
        begin = time.perf_counter()
        self.model = random_model(self.shape, tokens, device)
        self.ids = torch.randint(0, self.shape.vocabulary, (1, tokens), device=device)
        print(f"a model of {self.model.num_parameters():,} weights in {time.perf_counter() - begin:.1f} s", flush=True)
        self.kinds = cases(self.model, tokens, chunked=chunk < tokens)
        self.logits: dict[str, Tensor] = {}

    def warm(self, case: str) -> None:
        """Compile and allocate: two chunks, which is everything where there is one."""
        with self.kinds[case]():
            forward(self.model, self.ids[:, : 2 * self.chunk], self.chunk)

    def turn(self, case: str) -> dict[str, Any]:
        """Run ``case`` once: seconds, peak bytes and, where it traces, the record's size and the checks."""
        traced = case.startswith("rows")
        every = EVERY if case == SPARSE else 1
        one = OneQuery((0, self.shape.layers - 1), (self.tokens - 1) // every * every)
        clock = Clock(self.device)
        with ExitStack() as stack:
            tracer = stack.enter_context(self.kinds[case]())
            if traced:
                stack.enter_context(attached(self.model, one))
            with clock:
                self.logits[case] = forward(self.model, self.ids, self.chunk)
        found: dict[str, Any] = {"seconds": clock.seconds, "peak bytes": clock.peak}
        if traced:
            begin = time.perf_counter()
            record = tracer.record
            found |= {"gathering, seconds": time.perf_counter() - begin, "record bytes": record.nbytes}
            found["checks"] = compare(record, one, self.tokens)
        if "untraced" in self.logits and case not in ("untraced", EDITED):
            check = compare_logits(self.logits[case], self.logits["untraced"], self.shape.layers)
            found["checks"] = [*found.get("checks", []), check]
        return found


def run(bench: Benchmark, chosen: list[str], repeats: int) -> Iterator[list[dict[str, Any]]]:
    """What is known of every case, after every pass; a case that failed is not tried again."""
    known: dict[str, dict[str, Any]] = {case: {"case": case, "seconds": []} for case in chosen}
    for turn in range(repeats + 1):
        for case in chosen:
            if "error" in known[case]:
                continue
            found: dict[str, Any] = {}
            try:
                if turn:
                    found = bench.turn(case)
                else:
                    bench.warm(case)
            except Exception as error:  # out of memory, say
                known[case]["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            gc.collect()
            if torch.cuda.is_available() and "error" in known[case]:  # timed passes should not allocate anew
                torch.cuda.empty_cache()
            if found:
                known[case] |= {**found, "seconds": [*known[case]["seconds"], found["seconds"]]}
            print(case, found or known[case].get("error", "warmed up"), flush=True)
            yield list(known.values())


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, measure, and write what was measured after every pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--tokens", type=int, help="length of the prompt (the shape's own)")
    parser.add_argument("--chunk", type=int, help="tokens read at once, 0 for all (the shape's own)")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cases", help=f"some of: untraced; attached; rows; {SPARSE}; rows and columns; {EDITED}")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    args = parser.parse_args(arguments)
    shape, device = SHAPES[args.shape], "cuda" if torch.cuda.is_available() else "cpu"
    tokens = args.tokens or shape.tokens
    chunk = (shape.chunk if args.chunk is None else args.chunk) or tokens
    default = ["untraced", "rows"] if chunk < tokens else ["untraced", "rows", SPARSE, "rows and columns"]
    chosen = [case.strip() for case in args.cases.split(";")] if args.cases else default
    expected = estimate(shape, tokens, chunk, VALUES)
    print("GiB expected:", {name: round(size, 2) for name, size in expected.items()}, flush=True)
    words = shlex.join(arguments if arguments is not None else sys.argv[1:])
    result: dict[str, Any] = {"kind": "long context", "machine": machine(), "shape": args.shape, "tokens": tokens}
    result |= {"chunk": chunk, "command": f"python -m headscope.interp.benchmarks.long_context {words}"}
    result |= {"GiB expected": expected, "cases": []}
    bench = Benchmark(args.shape, tokens, chunk, device)
    unknown = sorted(set(chosen) - set(bench.kinds))
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}")
    for known in run(bench, chosen, args.repeats):
        result["cases"] = known
        if args.out:
            save(result, args.out, f"{args.shape}-{tokens}")
    print(page(result))
    return result


if __name__ == "__main__":
    main()
