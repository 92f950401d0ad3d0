"""Edited attention by PyTorch's FlexAttention: the output and lse of a call whose scores a function changes.

1. score_mod is what a ``ScoreEdit`` is an edit of: softcap, then the key bias, then the edit, element by element.
2. mask_mod is the ``Mask``, element by element; which blocks of 128 x 128 it shows in part or whole is worked out from
   the rules themselves, on whole blocks, so that no query x key mask exists.
3. A sink logit z joins afterwards: lse' = log(exp lse + exp z), and the output is multiplied by exp(lse - lse').

FlexAttention compiles both functions into one kernel for each set of rules and each edit (some seconds, once a
process). It has no statistics: those come from the streaming engine, which evaluates the same functions tile by tile.
Source: Dong et al. 2024 (arXiv 2412.05496) and ``torch.nn.attention.flex_attention``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from headscope.kernels.fallback import COMPILERS, EngineWarning, first_line
from headscope.kernels.masks import Mask
from headscope.kernels.request import Reduced, Request
from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.scores import Scores
from headscope.kernels.streaming import engine as streaming

BLOCK = 128
SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 1}  # tiles for edits that look up tables: those lie beside them
VARIANTS = 256  # kernels that one process may compile: dynamo's own limit of 8 is meant for one model
_NOT_COMPILED: WeakSet[ScoreEdit] = WeakSet()  # edits that FlexAttention refused once


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether FlexAttention computes these inputs, fused: half precision on a GPU, and a block of queries or more."""
    half = q.dtype in (torch.float16, torch.bfloat16) and q.dtype == v.dtype
    fits = q.shape[2] >= BLOCK and min(q.shape[3], v.shape[3]) >= 16 and max(q.shape[3], v.shape[3]) <= 256
    return q.is_cuda and half and fits and hasattr(flex, "AuxRequest") and find_spec("triton") is not None


def attend(
    scores: Scores,
    v: Tensor,
    *,
    request: Request,
) -> Reduced:
    """Compute ``request``: the output and the lse of all rows by FlexAttention, everything else by streaming.

    Shapes and meaning as in ``headscope.kernels.attention.attend``. An edit that FlexAttention cannot compile is
    computed by streaming, with a warning that says why.
    """
    lse, edit = request.lse and request.query_rows is None, scores.edit
    left = edit is not None and (edit in _NOT_COMPILED or not edit.pointwise)
    if not (request.output or lse) or not takes(scores.q, v) or left:
        return streaming.attend(scores, v, request=request)
    try:
        output, norm = attention(scores, v)
    except Exception as error:
        if not type(error).__module__.startswith(COMPILERS):
            raise
        said = f"FlexAttention does not compile this call, so streaming computes it: {first_line(error)}"
        warnings.warn(said, EngineWarning, stacklevel=3)
        if edit is not None:
            _NOT_COMPILED.add(edit)
        return streaming.attend(scores, v, request=request)
    rest = replace(request, output=False, lse=request.lse and not lse)
    result = streaming.attend(scores, v, request=rest) if rest.wants_statistics else Reduced()
    result.output = output if request.output else None
    result.lse = norm if lse else result.lse
    return result


def attention(
    scores: Scores,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    """The output (batch, head, query, d_value) in the value's dtype and the lse (batch, head, query) in float32.

    On a GPU one compiled kernel; on a CPU FlexAttention's own dense form, for tests alone.
    """
    q, k, sinks = scores.q, scores.k, scores.sinks
    options: dict[str, Any] = {
        "score_mod": _score_mod(scores),
        "block_mask": block_mask(scores.mask, q.shape[0], q.shape[2], k.shape[2], q.device),
        "scale": scores.scale,
        "enable_gqa": q.shape[1] != k.shape[1],
        "return_aux": flex.AuxRequest(lse=True),
    }
    output, aux = _fused(q, k, v, **options) if q.is_cuda else flex.flex_attention(q, k, v, **options)
    lse = aux.lse
    empty = lse == -torch.inf
    if sinks is not None:
        whole = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
        output = output * torch.exp(lse - whole)[..., None]
        lse = whole.masked_fill(empty, -torch.inf)
    return torch.where(empty[..., None], 0.0, output).to(v.dtype), lse


def _fused(*args: Any, **options: Any) -> Any:
    # the stance: ours is compiled, also where the model around it is to run uncompiled
    with torch._dynamo.config.patch(recompile_limit=VARIANTS), torch.compiler.set_stance("default"):
        try:
            return _compiled()(*args, **options)
        except Exception as error:
            if "out of resource" not in str(error):
                raise
        return _compiled()(*args, **options, kernel_options=SMALL)


@functools.cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex.flex_attention, fullgraph=True)
    return compiled


def _score_mod(scores: Scores) -> Callable[..., Tensor] | None:
    """Step 1. Numbers are tensors: one that changes with every call would be compiled anew as a constant."""
    q, softcap, bias, edit = scores.q, scores.softcap, scores.bias, scores.edit
    if softcap is None and bias is None and edit is None:
        return None
    cap = None if softcap is None else torch.tensor(softcap, device=q.device)
    keyed = None if bias is None else bias.float().expand(q.shape[0], q.shape[1], -1).contiguous()
    first_query, first_key = _numbers(q.device, scores.mask.query_offset, scores.mask.key_offset)

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap is not None:
            s = cap * torch.tanh(s / cap)
        own = None if keyed is None else keyed[b, h, j]
        s = s if own is None else s + own
        if edit is None:
            return s
        s = edit(s, b, h, i + first_query, j + first_key)
        return s if own is None else torch.where(own == -torch.inf, -torch.inf, s)  # no edit brings a key back

    return score_mod


def _numbers(device: torch.device, *numbers: int) -> list[Tensor]:
    return [torch.tensor(x, device=device) for x in numbers]


def block_mask(mask: Mask, batch: int, queries: int, keys: int, device: torch.device) -> Any:
    """Step 2: ``mask`` as FlexAttention takes it."""
    some, every = visible_blocks(mask, queries, keys, device)
    partial, whole = some & ~every, every
    numbers, indices = _listed(partial)
    full_numbers, full_indices = _listed(whole)
    return flex.BlockMask.from_kv_blocks(
        numbers,
        indices,
        full_numbers,
        full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask_mod(mask, batch, device),
        seq_lengths=(queries, keys),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks are chosen for every query block, and their indices first."""
    order = torch.argsort(chosen.to(torch.uint8), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def visible_blocks(mask: Mask, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which blocks may show a pair and which show all of theirs: bool (batch or 1, 1, query block, key block).

    ``segments`` and ``rule`` are not asked: their blocks may show a pair, and none counts as whole.
    """
    q0, q1, q_whole = _edges(queries, mask.query_offset, device)
    k0, k1, k_whole = _edges(keys, mask.key_offset, device)
    q0, q1, q_whole = q0[:, None], q1[:, None], q_whole[:, None]
    every = (q_whole & k_whole)[None]
    some = torch.ones_like(every)
    if mask.right is not None:
        some, every = some & (k0 <= q1 + mask.right), every & (k1 <= q0 + mask.right)
    if mask.left is not None:
        some, every = some & (k1 >= q0 - mask.left), every & (k0 >= q1 - mask.left)
    if mask.start is not None:
        at = mask.start[:, None, None]
        some, every = some & (k1 >= at), every & (k0 >= at)
    if mask.end is not None:
        at = mask.end[:, None, None]
        some, every = some & (k0 < at), every & (k1 < at)
    if mask.chunk is not None:
        at = torch.zeros(1, 1, 1, dtype=q0.dtype, device=device) if mask.origin is None else mask.origin[:, None, None]
        a0, a1, b0, b1 = ((x - at) // mask.chunk for x in (q0, q1, k0, k1))
        some, every = some & (b0 <= a1) & (b1 >= a0), every & (a0 == a1) & (b0 == b1) & (a0 == b0)
    if mask.segments is not None or mask.rule is not None:
        every = torch.zeros_like(every)
    shape = torch.broadcast_shapes(some.shape, every.shape)
    return some.expand(shape)[:, None], every.expand(shape)[:, None]


def _edges(count: int, offset: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The first and last position of every block of ``count`` positions from ``offset``, and whether it is filled."""
    first = torch.arange(0, count, BLOCK, device=device)
    last = torch.clamp(first + BLOCK, max=count) - 1
    return first + offset, last + offset, last - first == BLOCK - 1


def _mask_mod(mask: Mask, batch: int, device: torch.device) -> Callable[..., Tensor]:
    """Whether single pairs are visible: ``Mask.tile`` for FlexAttention, numbers as tensors (see ``_score_mod``)."""
    first_query, first_key = _numbers(device, mask.query_offset, mask.key_offset)
    right, left, chunk = (
        None if x is None else torch.tensor(x, device=device) for x in (mask.right, mask.left, mask.chunk)
    )

    def each(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(batch, *x.shape[1:]).contiguous()

    start, end, origin, segments = (each(x) for x in (mask.start, mask.end, mask.origin, mask.segments))
    rule = mask.rule

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q, k = i + first_query, j + first_key
        seen = j >= 0
        if right is not None:
            seen = seen & (k <= q + right)
        if left is not None:
            seen = seen & (k >= q - left)
        if start is not None:
            seen = seen & (k >= start[b])
        if end is not None:
            seen = seen & (k < end[b])
        if chunk is not None:
            at = 0 if origin is None else origin[b]
            seen = seen & ((k - at) // chunk == (q - at) // chunk)
        if segments is not None:
            seen = seen & (segments[b, k] == segments[b, q])
        return seen if rule is None else seen & rule(b, h, q, k)

    return visible
