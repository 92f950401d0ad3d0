"""The public reductions of attention. Each function picks the engine; all engines compute what ``reference`` defines.

Engines: ``"reference"`` (dense: short sequences, and the definition), ``"streaming"`` (plain PyTorch, any device),
``"triton"`` (GPU kernels) and ``"flex"`` (FlexAttention, for scores that a function edits); what these two do not
compute falls to streaming inside the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from headscope.kernels import first_call, reference
from headscope.kernels.request import Reduced, Request
from headscope.kernels.scores import Scores
from headscope.kernels.streaming import backward, library
from headscope.kernels.streaming import engine as streaming
from headscope.kernels.streaming.weights import log_tile

Engine = Literal["auto", "reference", "streaming", "triton", "flex"]
_HALF_TO_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def attend(
    scores: Scores,
    v: Tensor,
    *,
    request: Request,
    engine: Engine = "auto",
) -> Reduced:
    """One attention call: its output and every reduction in ``request``, in as few passes as the engine can.

    Statistics carry no gradient. The output does where q, k, v, sinks, bias or a declared edit's tables require one: it
    is then computed apart, by the library or, with softcap, sinks, bias or edit, a few rows at a time
    (``streaming.backward``).

    Args:
        scores: queries, keys, and how they become scores; statistics are those of the edited pattern. A declared
            ``edit`` is evaluated by Triton's kernels; a function by streaming tile by tile, on any device, its output
            and lse by FlexAttention on a GPU, where it takes the call.
        v: values (batch, kv_head, key, d_value); d_value may differ from d_head.
        request: what to compute.
        engine: ``"auto"`` picks the fastest engine for the device.

    Raises:
        ValueError: shapes that do not belong together, or an unknown engine.
    """
    scores.check(v)
    check_request(scores, request)
    run = _engine(engine, scores, v)
    out = None
    if request.output and wants_gradient(scores, v):
        out = _differentiable_output(scores, v)
        request = replace(request, output=False)
    if not torch.is_grad_enabled():  # to enter a block takes as long as an operation
        return run(scores, v, request=request)
    with torch.no_grad():
        result = run(scores, v, request=request)
    result.output = result.output if out is None else out
    return result


def output(scores: Scores, v: Tensor) -> Tensor:
    """The attention output alone (batch, head, query, d_value), by PyTorch's own kernel wherever it has one."""
    scores.check(v)
    if scores.is_plain and (not _triton_takes(scores.q, v) or library.covers(scores.mask, *scores.shape[2:])):
        return library.attention(scores, v)
    out = attend(scores, v, request=Request()).output
    assert out is not None
    return out


def wants_gradient(scores: Scores, *others: Tensor | None) -> bool:
    """Whether any of a call's inputs requires a gradient, a declared edit's tables among them.

    What a function that edits scores holds cannot be asked: its gradient is kept where another input requires one.
    """
    if not torch.is_grad_enabled():
        return False
    tables = () if scores.edit is None else scores.edit.tensors
    for x in (scores.q, scores.k, scores.sinks, scores.bias, *tables, *others):
        if x is not None and x.requires_grad:
            return True
    return False


def _differentiable_output(scores: Scores, v: Tensor) -> Tensor:
    if scores.is_plain:
        return library.attention(scores, v)
    return backward.attention(scores, v)


def _engine(engine: str, scores: Scores, v: Tensor) -> Callable[..., Reduced]:
    if engine == "auto":
        function = scores.edit is not None and not (scores.in_kernels and scores.mask.rule is None)
        fits = _triton_takes(scores.q, v) and not function
        engine = "triton" if fits else "flex" if function and scores.q.is_cuda else "streaming"
    if engine == "reference":
        return reference.attend
    if engine == "streaming":
        return streaming.attend
    if engine == "triton":
        run: Callable[..., Reduced] = _triton_engine().attend
        return run
    if engine == "flex":
        from headscope.kernels import flex  # slow to import

        return flex.attend
    raise ValueError(f"unknown engine {engine!r}; choose 'auto', 'reference', 'streaming', 'triton' or 'flex'")


def uses_triton(engine: str, scores: Scores) -> bool:
    """Whether ``engine`` computes a reduction of ``scores`` by a Triton kernel."""
    wanted = engine == "triton" or (engine == "auto" and _triton_takes(scores.q, scores.k))
    if not wanted:
        return False
    return bool(_triton_engine().takes(scores, scores.k))


def _triton_takes(q: Tensor, v: Tensor) -> bool:
    if not q.is_cuda:
        return False
    fits = q.dtype in _HALF_TO_SINGLE and q.dtype == v.dtype and max(q.shape[-1], v.shape[-1]) <= 256
    return fits and first_call.has_triton()


@cache
def prepare(device: torch.device) -> None:
    """Begin all that a first call on ``device`` waits for, where that is a GPU."""
    if device.type == "cuda" and first_call.has_triton():
        first_call.begin(lambda: _prepare(device))


def _prepare(device: torch.device) -> None:
    from headscope.kernels import gpu_engine  # noqa: F401
    from headscope.kernels.hopper.dispatch import works_on
    from headscope.kernels.triton import few_columns, few_lists, listed, targets, topk  # noqa: F401

    works_on(device)
    first_call.read_triton()


@cache
def _triton_engine() -> ModuleType:
    """The engine of Triton kernels, during whose import Triton begins to read its files."""
    if first_call.has_card():
        first_call.begin(first_call.read_triton)
    with first_call.uncollected():
        from headscope.kernels import gpu_engine

        return gpu_engine


@torch.no_grad()
def pattern(
    scores: Scores,
    *,
    rows: slice = slice(None),
    keys: slice = slice(None),
) -> Tensor:
    """One exact tile of the pattern: rows ``rows`` and keys ``keys`` of (batch, head, row, key), at least float32.

    The softmax runs over all the keys of each row, a block of rows at a time, so memory is the tile asked for.
    """
    batch, heads, queries, count = scores.shape
    rows, keys = whole_slice(rows, queries), whole_slice(keys, count)
    if rows.start >= rows.stop or keys.start >= keys.stop:
        shape = (batch, heads, rows.stop - rows.start, keys.stop - keys.start)
        return torch.zeros(shape, dtype=scores.dtype, device=scores.q.device)
    request = Request(output=False, lse=True, query_rows=torch.arange(rows.start, rows.stop, device=scores.q.device))
    lse = attend(scores, scores.k, request=request).lse
    assert lse is not None
    return log_tile(scores, lse, rows, keys).exp_()


def whole_slice(part: slice, count: int) -> slice:
    """``part`` of ``count`` places with both its ends. Raises ValueError for a step other than 1."""
    start, stop, step = part.indices(count)
    if step != 1:
        raise ValueError(f"a tile is a run of rows and keys; take every {step}th of its rows afterwards")
    return slice(start, max(start, stop))


def check_request(scores: Scores, request: Request) -> None:
    """Raise ValueError where ``request`` does not fit a call."""
    linear = request.linear
    if linear is None and request.targets is None and not request.columns:
        return
    _, _, queries, keys = scores.shape
    if linear is not None and (linear.dim() not in (2, 3) or linear.shape[-2] != keys):
        raise ValueError(f"linear must be (key, n) or (batch, key, n) with {keys} keys; got {tuple(linear.shape)}")
    if request.targets is not None and (request.targets.dim() != 3 or request.targets.shape[1] != queries):
        raise ValueError(f"targets must be (batch or 1, {queries}, t); got {tuple(request.targets.shape)}")
    for first, stop in (each.rows(queries) for each in request.columns):
        if not 0 <= first <= stop <= queries:
            raise ValueError(f"columns over the queries {first}:{stop} of {queries} do not exist")
