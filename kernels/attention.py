"""The public reductions of attention. Each function picks the engine; all engines compute what ``reference`` defines.

Engines: ``"reference"`` (dense: short sequences, and the definition), ``"streaming"`` (plain PyTorch, any device),
``"triton"`` (GPU kernels) and ``"flex"`` (FlexAttention, for edited scores); what these two do not compute falls to
streaming inside the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from headscope.kernels import reference
from headscope.kernels.masks import Mask
from headscope.kernels.request import Reduced, Request
from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.streaming import engine as streaming
from headscope.kernels.streaming import library
from headscope.kernels.streaming.weights import log_tile

Engine = Literal["auto", "reference", "streaming", "triton", "flex"]
_HALF_TO_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    edit: ScoreEdit | None = None,
    request: Request,
    engine: Engine = "auto",
) -> Reduced:
    """One attention call: its output and every reduction in ``request``, in as few passes as the engine can.

    Statistics carry no gradient. The output does where q, k, v, sinks or bias require one: it is then computed apart,
    by the library or, with softcap, sinks, bias or edit, densely.

    Args:
        q: queries (batch, head, query, d_head), after position embedding and any normalisation.
        k: keys (batch, kv_head, key, d_head); query head ``h`` reads ``kv_head = h // (head / kv_head)``.
        v: values (batch, kv_head, key, d_value); d_value may differ from d_head.
        mask: which keys each query sees.
        scale: multiplies q.k.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: one extra logit a head (head,) in the softmax denominator.
        bias: a logit added to each key's score after softcap (batch or 1, head or 1, key). Adding ``log c`` multiplies
            the key's weight by ``c`` before renormalisation, and -inf takes the key away; statistics are those of the
            edited pattern.
        edit: changes the scores last, after softcap and bias, of the pairs that the mask shows; statistics are those
            of the edited pattern. Streaming evaluates it tile by tile on any device; the output and lse come from
            FlexAttention on a GPU, where it takes the call.
        request: what to compute.
        engine: ``"auto"`` picks the fastest engine for the device.

    Raises:
        ValueError: shapes that do not belong together, or an unknown engine.
    """
    check(q, k, v, sinks, bias)
    check_request(q, k, request)
    run = _engine(engine, q, v, edit)
    call = {"mask": mask, "scale": scale, "softcap": softcap, "sinks": sinks, "bias": bias, "edit": edit}
    if request.output and wants_gradient(q, k, v, sinks, bias):
        out = _differentiable_output(q, k, v, call)
        request = replace(request, output=False)
    else:
        out = None
    with torch.no_grad():
        result = run(q, k, v, **call, request=request)
    result.output = result.output if out is None else out
    return result


def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    edit: ScoreEdit | None = None,
) -> Tensor:
    """The attention output alone (batch, head, query, d_value), by PyTorch's own kernel wherever it has one."""
    check(q, k, v, sinks, bias)
    call: dict[str, Any] = {
        "mask": mask,
        "scale": scale,
        "softcap": softcap,
        "sinks": sinks,
        "bias": bias,
        "edit": edit,
    }
    if _is_plain(call) and (library.covers(mask, q.shape[2], k.shape[2]) or not _triton_takes(q, v)):
        return library.attention(q, k, v, mask=mask, scale=scale)
    out = attend(q, k, v, **call, request=Request()).output
    assert out is not None
    return out


def wants_gradient(*inputs: Tensor | None) -> bool:
    """Whether any of a call's inputs requires a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _is_plain(call: dict[str, Any]) -> bool:
    """Whether nothing but a mask and a scale stands between q.k and softmax."""
    return all(call[name] is None for name in ("softcap", "sinks", "bias", "edit"))


def _differentiable_output(q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any]) -> Tensor:
    if _is_plain(call):
        return library.attention(q, k, v, mask=call["mask"], scale=call["scale"])
    out = reference.attend(q, k, v, **call, request=Request()).output
    assert out is not None
    return out.to(v.dtype)


def _engine(engine: str, q: Tensor, v: Tensor, edit: ScoreEdit | None) -> Callable[..., Reduced]:
    if engine == "auto":
        engine = "flex" if edit is not None and q.is_cuda else "triton" if _triton_takes(q, v) else "streaming"
    if engine == "reference":
        return reference.attend
    if engine == "streaming":
        return streaming.attend
    if engine == "triton":
        from headscope.kernels import gpu_engine as triton_engine

        return triton_engine.attend
    if engine == "flex":
        from headscope.kernels import flex  # slow to import

        return flex.attend
    raise ValueError(f"unknown engine {engine!r}; choose 'auto', 'reference', 'streaming', 'triton' or 'flex'")


def uses_triton(engine: str, q: Tensor, k: Tensor, mask: Mask) -> bool:
    """Whether ``engine`` computes a reduction of ``q`` and ``k`` under ``mask`` by a Triton kernel."""
    wanted = engine == "triton" or (engine == "auto" and _triton_takes(q, k))
    if not wanted:
        return False
    from headscope.kernels import gpu_engine as triton_engine

    return triton_engine.takes(q, k, mask)


def _triton_takes(q: Tensor, v: Tensor) -> bool:
    fits = q.dtype in _HALF_TO_SINGLE and q.dtype == v.dtype and max(q.shape[-1], v.shape[-1]) <= 256
    return q.is_cuda and fits and find_spec("triton") is not None


@torch.no_grad()
def pattern(
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    edit: ScoreEdit | None = None,
    rows: slice = slice(None),
    keys: slice = slice(None),
) -> Tensor:
    """One exact tile of the pattern: rows ``rows`` and keys ``keys`` of (batch, head, row, key), at least float32.

    The softmax runs over all the keys of each row, a block of rows at a time, so memory is the tile asked for.
    """
    rows, keys = whole_slice(rows, q.shape[2]), whole_slice(keys, k.shape[2])
    call: dict[str, Any] = {"mask": mask, "scale": scale, "softcap": softcap, "bias": bias, "edit": edit}
    if rows.start >= rows.stop or keys.start >= keys.stop:
        dtype = torch.promote_types(q.dtype, torch.float32)
        return torch.zeros(*q[:, :, rows].shape[:3], k[:, :, keys].shape[2], dtype=dtype, device=q.device)
    request = Request(output=False, lse=True, query_rows=torch.arange(rows.start, rows.stop, device=q.device))
    lse = attend(q, k, k, **call, sinks=sinks, request=request).lse
    assert lse is not None
    return log_tile(q, k, lse, rows, keys, **call).exp_()


def whole_slice(part: slice, count: int) -> slice:
    """``part`` of ``count`` places with both its ends. Raises ValueError for a step other than 1."""
    start, stop, step = part.indices(count)
    if step != 1:
        raise ValueError(f"a tile is a run of rows and keys; take every {step}th of its rows afterwards")
    return slice(start, max(start, stop))


def check(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None) -> None:
    """Raise ValueError where the inputs of a call do not belong together."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must be (batch, head, position, d); got {[tuple(x.shape) for x in (q, k, v)]}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v do not belong together: {[tuple(x.shape) for x in (q, k, v)]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads evenly")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must have one logit a head, shape ({q.shape[1]},); got {tuple(sinks.shape)}")
    sizes = ((1, q.shape[0]), (1, q.shape[1]), (k.shape[2],))
    if bias is not None and (bias.dim() != 3 or any(n not in fit for n, fit in zip(bias.shape, sizes, strict=True))):
        raise ValueError(f"bias must be ({q.shape[0]} or 1, {q.shape[1]} or 1, {k.shape[2]}); got {tuple(bias.shape)}")


def check_request(q: Tensor, k: Tensor, request: Request) -> None:
    """Raise ValueError where ``request`` does not fit a call."""
    linear = request.linear
    if linear is not None and (linear.dim() not in (2, 3) or linear.shape[-2] != k.shape[2]):
        raise ValueError(
            f"linear must be (key, n) or (batch, key, n) with {k.shape[2]} keys; got {tuple(linear.shape)}"
        )
    if request.targets is not None and (request.targets.dim() != 3 or request.targets.shape[1] != q.shape[2]):
        raise ValueError(f"targets must be (batch or 1, {q.shape[2]}, t); got {tuple(request.targets.shape)}")
    for first, stop in (each.rows(q.shape[2]) for each in request.columns):
        if not 0 <= first <= stop <= q.shape[2]:
            raise ValueError(f"columns over the queries {first}:{stop} of {q.shape[2]} do not exist")
