"""What ``corners`` times beside SDPA, what that cost before, and what it may cost; ``corner_list`` names all of it.

Every function gives a row's measurements on fresh tensors, divided by ``less`` in length (1; more to try the script).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headscope.kernels import attention
from headscope.kernels import gpu_passes as passes
from headscope.kernels.blocks import blocks
from headscope.kernels.divergence import divergence
from headscope.kernels.masks import Mask
from headscope.kernels.redistribute import redistribute
from headscope.kernels.redistribution import Redistribution
from headscope.kernels.request import Request
from headscope.kernels.score_edits import by_distance, distance_slope
from headscope.kernels.scores import Scores
from headscope.kernels.spans import span_outputs

HEADS, KV_HEADS = 32, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BFLOAT16 = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # Triton's interpreter has no bfloat16
STATISTICS = frozenset({"lse", "entropy"})
ONLY_LSE = frozenset({"lse"})


@dataclass(frozen=True)
class Timed:
    """One measurement: what runs, SDPA on the same tensors (None: ``run`` gives microseconds itself), the ratios."""

    name: str
    run: Callable[[], Any]
    base: Callable[[], Any] | None
    key: Any  # of the tensors: SDPA on them is timed once
    now: float | None  # nobody timed it before
    target: float


class Call:
    """Tensors, their scores under a causal mask, and SDPA."""

    def __init__(
        self, n: int, d: int, less: int, *, dtype: torch.dtype = BFLOAT16, queries: int = 0, heads: int = HEADS
    ) -> None:
        n, heads = max(64, n // less), heads if less == 1 else 4
        kv = max(1, heads * KV_HEADS // HEADS)
        rows = queries or n
        gen = torch.Generator(DEVICE).manual_seed(0)
        shapes = ((1, heads, rows, d), (1, kv, n, d), (1, kv, n, d))
        self.q, self.k, self.v = (torch.randn(s, generator=gen, device=DEVICE, dtype=dtype) for s in shapes)
        self.gen, self.heads, self.n = gen, heads, n
        self.key = (n, d, dtype, rows)
        self.scores = Scores(self.q, self.k, Mask.causal(n - rows), d**-0.5)

    def sdpa(self) -> Tensor:
        return F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=self.q.shape[2] > 1, enable_gqa=True)

    def rows(self, wants: frozenset[str] = STATISTICS, *, features: Tensor | None = None, **options: Any) -> Any:
        v = self.v if "output" in wants else None
        call = self.scores.device_arguments | options
        wants = wants if features is None else wants | {"linear"}
        return passes.rows(self.q, self.k, v, wants=wants, features=features, **call)

    def lse(self, **options: Any) -> Tensor:
        lse: Tensor = self.rows(ONLY_LSE, **options).lse
        return lse

    def columns(self, lse: Tensor, **options: Any) -> Any:
        return passes.columns(self.q, self.k, lse, **(self.scores.device_arguments | options))

    def timed(self, name: str, run: Callable[[], Any], now: float | None, target: float) -> Timed:
        return Timed(name, run, self.sdpa, self.key, now, target)


WITH_OUTPUT = STATISTICS | {"output"}


def width(d: int, now: tuple[float, ...], target: tuple[float, ...], less: int) -> Iterator[Timed]:
    """Rows, rows with the output, columns."""
    call = Call(16384, d, less)
    yield call.timed("rows", call.rows, now[0], target[0])
    yield call.timed("rows + output", partial(call.rows, WITH_OUTPUT), now[1], target[1])
    yield call.timed("columns", partial(call.columns, call.lse()), now[2], target[2])


def narrow(less: int) -> Iterator[Timed]:
    call = Call(65536, 64, less)
    spans = torch.arange(call.n, device=DEVICE)[:, None] * 16 // call.n == torch.arange(16, device=DEVICE)
    yield call.timed("rows + 16 spans", partial(call.rows, features=spans), 0.67, 0.60)
    lse = call.lse()
    yield call.timed("columns", partial(call.columns, lse), 0.64, 0.52)
    yield call.timed("columns + lse", lambda: call.columns(call.lse()), 1.24, 1.05)


def single(d: int, less: int) -> Iterator[Timed]:
    call = Call(8192, d, less, dtype=torch.float32)
    yield call.timed("rows", call.rows, 0.6, 0.15)
    yield call.timed("rows + output", partial(call.rows, WITH_OUTPUT), 2.3, 0.35)
    yield call.timed("columns", partial(call.columns, call.lse()), 0.7, 0.15)


def capped(d: int, less: int) -> Iterator[Timed]:
    call = Call(16384, d, less)
    yield call.timed("rows", partial(call.rows, softcap=50.0), 1.96, 0.8)
    yield call.timed("rows + output", partial(call.rows, WITH_OUTPUT, softcap=50.0), 2.40, 1.3)


def packed(less: int) -> Iterator[Timed]:
    call = Call(16384, 128, less)
    segments = torch.arange(call.n, device=DEVICE)[None] * 8 // call.n
    mask = replace(call.scores.mask, segments=segments)
    yield call.timed("rows", partial(call.rows, mask=mask), 1.89, 0.25)
    yield call.timed("rows + output", partial(call.rows, WITH_OUTPUT, mask=mask), 2.5, 0.4)
    yield call.timed("columns", partial(call.columns, call.lse(mask=mask), mask=mask), 1.9, 0.25)


def maps(less: int) -> Iterator[Timed]:
    call = Call(16384, 128, less)
    lse = call.lse()
    yield call.timed("blocks of 64", partial(blocks, call.scores, size=64, lse=lse), 1.41, 0.75)
    yield call.timed("blocks of 128", partial(blocks, call.scores, size=128, lse=lse), 1.74, 0.75)


def biased(less: int) -> Iterator[Timed]:
    call = Call(16384, 128, less)
    bias = torch.randn(1, call.heads, call.n, generator=call.gen, device=DEVICE)
    yield call.timed("statistics", partial(call.rows, bias=bias), 0.85, 0.65)
    yield call.timed("with output, statistics", partial(call.rows, WITH_OUTPUT, bias=bias), 1.49, 1.08)
    yield call.timed("columns", partial(call.columns, call.lse(bias=bias), bias=bias), 0.8, 0.6)


def apart(d: int, now: float, target: float, less: int) -> Iterator[Timed]:
    call = Call(16384, d, less)
    yield call.timed("divergence", partial(divergence, call.scores, replace(call.scores, k=call.v)), now, target)


def moved(less: int) -> Iterator[Timed]:
    call = Call(16384, 128, less)
    first = torch.arange(call.n, device=DEVICE) < 1
    scattered = torch.rand(1, call.heads, call.n, generator=call.gen, device=DEVICE) < 0.2
    request = Request(output=True)
    for name, keys, now, target in (("sink", first, 1.9, 1.15), ("scattered 20 %", scattered, 5.2, 1.5)):
        move = Redistribution(keys, 0.5)
        yield call.timed(name, partial(redistribute, call.scores, call.v, move, request=request), now, target)


def split(n: int, spans: int, now: float, target: float, less: int) -> Iterator[Timed]:
    call = Call(n, 128, less)
    ends = [(i * call.n // spans, (i + 1) * call.n // spans) for i in range(spans)]
    yield call.timed(f"{spans} spans", partial(span_outputs, call.scores, call.v, ends), now, target)
    yield call.timed("from lse", partial(span_outputs, call.scores, call.v, ends, lse=call.lse()), now, target)
    short = [(start, start + call.n // 64) for start, _ in ends]
    yield call.timed("short ones", partial(span_outputs, call.scores, call.v, short), now, target)


def top(n: int, now: float, target: float, less: int) -> Iterator[Timed]:
    call = Call(n, 128, less)
    lse = call.lse()
    listed = partial(passes.top_keys, call.q, call.k, lse, count=16, **call.scores.device_arguments)
    yield call.timed("top 16", listed, now, target)


def edited(less: int) -> Iterator[Timed]:
    call = Call(16384, 128, less)
    slope = distance_slope(torch.full((call.heads,), 1e-3, device=DEVICE))
    scores = replace(call.scores, edit=slope)
    run = partial(attention.attend, scores, call.v)
    yield call.timed("output", partial(run, request=Request()), 2.66, 1.8)
    yield call.timed("statistics", partial(run, request=Request(output=False, lse=True, entropy=True)), 50.0, 3.0)
    yield call.timed("with output, statistics", partial(run, request=Request(lse=True, entropy=True)), None, 3.0)
    yield call.timed("columns", partial(call.columns, call.lse(edit=slope), edit=slope), None, 3.0)


def looked_up(less: int) -> Iterator[Timed]:
    """A weight for every pair: of 4,096 distances."""
    call = Call(16384, 128, less)
    edit = by_distance(bias=torch.linspace(0.0, -1.0, 4096 // less, device=DEVICE).expand(call.heads, -1).contiguous())
    yield call.timed("statistics", partial(call.rows, edit=edit), None, 3.0)
    yield call.timed("with output, statistics", partial(call.rows, WITH_OUTPUT, edit=edit), None, 3.0)
    yield call.timed("columns", partial(call.columns, call.lse(edit=edit), edit=edit), None, 3.0)


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` captured once and replayed: no launches from Python."""
    if DEVICE == "cpu":
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def decode(less: int) -> Iterator[Timed]:
    call = Call(131072, 128, less, queries=1)
    lse = call.lse()
    options = call.scores.device_arguments

    def listed() -> Any:
        return passes.top_keys(call.q, call.k, call.lse(), count=16, **options)

    sdpa = graphed(call.sdpa)
    for name, run, now, target in (
        ("columns", partial(call.columns, lse), 4.2, 1.3),
        ("top 16 + lse", listed, 2.0, 1.3),
        ("rows", call.rows, 0.56, 0.6),
        ("rows + output", partial(call.rows, WITH_OUTPUT), 1.09, 1.1),
    ):
        yield Timed(name, graphed(run), sdpa, (*call.key, "graph"), now, target)


def host(less: int) -> Iterator[Timed]:
    """Microseconds of Python for a call whose work the card ends sooner."""
    call = Call(1024, 128, less, heads=4)
    targets = torch.zeros(1, call.n, 1, dtype=torch.int64, device=DEVICE)
    asked: dict[str, tuple[Callable[[], Any], float, float]] = {
        "rows": (call.rows, 240, 60),
        "columns": (partial(call.columns, call.lse()), 240, 60),
        "attend: lse, entropy": (_attends(call, Request(output=False, lse=True, entropy=True)), 310, 60),
        "attend: output, lse, entropy": (_attends(call, Request(lse=True, entropy=True)), 310, 60),
        "attend: targets": (_attends(call, Request(output=False, targets=targets)), 850, 80),
    }
    for name, (run, now, target) in asked.items():
        yield Timed(name, partial(_python, run, 1 if less > 1 else 40), None, None, now, target)


def _attends(call: Call, request: Request) -> Callable[[], Any]:
    return partial(attention.attend, call.scores, call.v, request=request)


def _python(run: Callable[[], Any], times: int) -> float:
    """Microseconds a call: the median of 15 batches of ``times``, each begun on an idle card, so that none waits for
    room among the launches; what interrupts a batch is not in the median."""
    took = []
    for batch in range(-5, 15):  # the first are no part of it: clocks rise, and memory is found again
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            run()
        if batch >= 0:
            took.append(time.perf_counter() - began)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1e6 * statistics.median(took) / times
