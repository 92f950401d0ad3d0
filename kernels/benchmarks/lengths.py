"""Time and memory against length: dense maps, flash-colreduce, our reductions, SDPA; one attention layer, causal.

    python -m headscope.kernels.benchmarks.lengths --out kernels/benchmarks/results

Medians of one run; memory is the peak of a call beyond its inputs. ``eager maps`` makes the map of one head at a time
and reduces it by rows and columns, as long as that fits; the statistics of all others are those of their names, all
heads at once. flash-colreduce (column sums) takes one key head a query head: the keys are repeated beforehand, neither
timed nor counted. A case that fails is noted and loses no other.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headscope.kernels import attention
from headscope.kernels.benchmarks.clock import Run, median
from headscope.kernels.benchmarks.pages import machine, save
from headscope.kernels.masks import Mask
from headscope.kernels.request import Columns, Request
from headscope.kernels.scores import Scores

HEADS, KV_HEADS, SPANS = 32, 8, 16
LENGTHS = tuple(1 << n for n in range(11, 18))


def tensors(tokens: int, d: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random bf16 q, k, v and the indicators of 16 spans, which share the tokens."""
    gen = torch.Generator(device).manual_seed(0)
    shapes = ((1, HEADS, tokens, d), (1, KV_HEADS, tokens, d), (1, KV_HEADS, tokens, d))
    q, k, v = (torch.randn(shape, generator=gen, device=device, dtype=torch.bfloat16) for shape in shapes)
    spans = torch.arange(tokens, device=device)[:, None] * SPANS // tokens == torch.arange(SPANS, device=device)
    return q, k, v, spans


def kinds(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, longest_eager: int) -> Iterator[tuple[str, Run]]:
    """What is measured, by name; a case's own inputs are made when its turn comes."""
    scores = Scores(q, k, Mask.causal(), q.shape[-1] ** -0.5)

    def ours(**wanted: Any) -> Run:
        request = Request(**wanted)
        return lambda: attention.attend(scores, v, request=request)

    yield "SDPA", lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    yield "rows", ours(output=False, lse=True, entropy=True, linear=spans)
    yield "rows and output", ours(lse=True, entropy=True, linear=spans)
    yield "columns and lse", ours(output=False, columns=(Columns(sum=True),))
    if find_spec("flash_colreduce"):
        wide, package = k.repeat_interleave(HEADS // KV_HEADS, dim=1), partial(import_module, "flash_colreduce")
        yield "flash-colreduce", lambda: package().flash_colreduce(q, wide, "sum", is_causal=True, scale=scores.scale)
        del wide
    if q.shape[2] <= longest_eager:
        yield "eager maps", lambda: eager_maps(q, k, spans.to(q.dtype))


def eager_maps(q: Tensor, k: Tensor, spans: Tensor) -> None:
    """Entropy, span masses and column sums from the whole map of one head, head after head."""
    tokens = q.shape[2]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu_(1)
    for h in range(HEADS):
        s = (q[0, h] @ k[0, h * KV_HEADS // HEADS].T).float() * q.shape[-1] ** -0.5
        p = s.masked_fill_(hidden, -torch.inf).softmax(-1)
        torch.special.entr(p).sum(-1), p.sum(0), p.to(q.dtype) @ spans


def peak_of(run: Run) -> int | None:
    """Bytes that ``run`` takes at its peak beyond what was allocated before; None where torch does not count them."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(lengths: tuple[int, ...], d: int, *, longest_eager: int, budget: float) -> Iterator[dict[str, Any]]:
    """One row a length and case, printed as it comes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for tokens in lengths:
        for what, run in kinds(*tensors(tokens, d, device), longest_eager):
            row: dict[str, Any] = {"what": what, "tokens": tokens}
            try:
                run()  # compiles
                row |= {"extra bytes": peak_of(run), "ms": median(run, budget, fewest=3)}
            except Exception as error:  # out of memory, say: reported, and the others go on
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            print(row, flush=True)
            yield row
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> Path | None:
    """Parse the command line, measure, and write what was measured after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--longest-eager", type=int, default=1 << 15)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds a case, at least three calls")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    args = parser.parse_args(arguments)
    command = f"python -m headscope.kernels.benchmarks.lengths --d {args.d} --budget {args.budget}"
    result: dict[str, Any] = {"kind": "lengths", "machine": machine(), "command": command, "rows": []}
    result |= {"heads": HEADS, "kv_heads": KV_HEADS, "d": args.d, "dtype": "bfloat16"}
    path = None
    for row in measure(tuple(args.lengths), args.d, longest_eager=args.longest_eager, budget=args.budget):
        result["rows"].append(row)
        path = save(result, args.out, f"lengths-d{args.d}") if args.out else None
    return path


if __name__ == "__main__":
    main()
