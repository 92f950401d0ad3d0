"""What every Triton kernel shares: fetching tiles, turning products into scores, launching.

Scores are held in units of ln 2 (exp2 is one instruction). A hidden key scores ``HIDDEN`` and a running maximum starts
at ``FLOOR`` above it, both finite: exp2 of their difference is exactly 0 and 0 times it is 0, where -inf gives NaN.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from headscope.kernels.fallback import build
from headscope.kernels.first_call import uncollected, wait
from headscope.kernels.replay import started

LOG2E = tl.constexpr(1.0 / math.log(2.0))
LN2 = tl.constexpr(math.log(2.0))
HIDDEN = tl.constexpr(-2e30)
FLOOR = tl.constexpr(-1e30)
# How float32 is multiplied, which other types do not ask: the matrix unit rounds to 11 bits, and three products of the
# parts of such numbers have 22 (Ootomo and Yokota 2022, arXiv:2203.03341), enough for a sum in float32. The parts of
# wider tiles than 128 fit nowhere: those are multiplied one by one.
PARTS, WHOLE = tl.constexpr("tf32x3"), tl.constexpr("ieee")


class Score(NamedTuple):
    """How q.k becomes a score."""

    scale: float
    softcap: float | None
    bias: Tensor | None  # (batch or 1, head or 1, key), float32, contiguous, in units of ln 2
    bias_batch: int
    bias_head: int
    sign: float | None  # multiplies the operand that stays: see ``signed``
    edited: int | None = None  # 1 with an ``edit``: Triton 3.4 to 3.6 cannot ask whether a tuple is None
    edit: tuple[Any, ...] | None = None  # see ``edit_arguments``


def score(
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    *,
    registers: bool = False,
    edit: tuple[Any, ...] | None = None,
) -> Score:
    """The kernel argument for ``scale``, ``softcap``, a key bias (batch or 1, head or 1, key), where -inf hides, and an
    ``edit`` as ``edit_arguments.argument`` gives it."""
    sign = math.copysign(1.0, scale) if registers or scale < 0 else None
    edited = None if edit is None else 1
    scale, softcap = float(abs(scale)), None if softcap is None else float(softcap)  # numpy's are none to Triton
    # a maximum commutes with positive scales only
    if bias is None:
        return Score(scale, softcap, None, 0, 0, sign, edited, edit)
    bias = (bias.float() * LOG2E.value).clamp_(min=HIDDEN.value).contiguous()
    batch, head = (0 if bias.shape[d] == 1 else bias.stride(d) for d in (0, 1))
    return Score(scale, softcap, bias, batch, head, sign, edited, edit)


def padded(d: int) -> int:
    """The tile width that holds ``d`` columns: a power of two, at least 16 (the narrowest matrix instruction)."""
    return max(16, 1 << (d - 1).bit_length())


def last_dim_contiguous(x: Tensor) -> Tensor:
    """``x``, copied only if its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


@contextmanager
def on_device(x: Tensor) -> Iterator[None]:
    """Launch on the card that holds ``x`` (Triton launches on the current one)."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            yield
    else:
        yield


# Sizes that change with the text. Triton compiles anew where a whole number becomes 1, or a multiple of 16, or is that
# no longer; of these numbers it is not told, so that one compiled kernel serves every length.
LENGTHS = {"rows", "queries", "keys", "first", "stop", "down", "across", "query_offset", "key_offset", "left", "right"}
LENGTHS |= {"segment_stride", "segment_count"}
ANY = 7  # stands for a length: neither 1 nor a multiple of 16


def any_length(arg: Any) -> Any:
    """An argument of a kernel as Triton is to compile for it: with ``ANY`` in the place of every length."""
    if type(arg) is int:
        return ANY if abs(arg) < 1 << 31 else arg
    places = _lengths(arg.__class__)
    if not places:
        return arg
    values = list(arg)
    for at in places:
        values[at] = any_length(values[at])
    return arg._make(values)


@cache
def _lengths(kind: Any) -> list[int]:
    """Which fields of a tuple of this class are lengths."""
    return [at for at, name in enumerate(getattr(kind, "_fields", ())) if name in LENGTHS]


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, **options: Any) -> None:
    """Run ``kernel`` on ``grid`` on the device of ``x``. Raises NotCompiled where it cannot be built."""
    with on_device(x):
        build(partial(_start, kernel, grid), kernel, x, args, options)


def _start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    if not isinstance(kernel, JITFunction):  # Triton's interpreter
        kernel[grid](*args, **options)
        started(None, args)
        return
    wait()
    with uncollected():  # the trees of the sources
        compiled = kernel.warmup(*map(any_length, args), grid=grid, **options)
    run, whole = compiled[(*grid, 1, 1)[:3]], (*args, *(options[name] for name in kernel.arg_names[len(args) :]))
    run(*whole)
    started(run, whole, compiled=True)


def has_copy_engine(x: Tensor) -> bool:
    """Whether ``x`` is on a card that has one: Hopper and later."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9


def tma(x: Tensor, rows: int, width: int) -> Any | None:
    """A descriptor by which Hopper's copy engine fetches ``rows`` x ``width`` of ``x`` (batch, head, position, d).

    None where it cannot: every stride must be a multiple of 16 bytes. Beyond the tensor it delivers zeros.
    """
    if x.numel() == 0 or not has_copy_engine(x):
        return None
    bytes_ = [x.data_ptr(), *(s * x.element_size() for s in x.stride()[:-1])]
    if x.stride(-1) != 1 or any(b % 16 or b == 0 for b in bytes_):
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, width])


@triton.jit
def load_rows(x, index, stride, count, d: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    """Rows ``index`` (n,) of ``x`` (count, d) as (n, D), zero beyond; ``WHOLE``: every index exists."""
    column = tl.arange(0, D)
    at = x + index.to(tl.int64)[:, None] * stride + column[None, :]
    if WHOLE and D == d:
        return tl.load(at)
    elif WHOLE:
        return tl.load(at, mask=(column < d)[None, :], other=0.0)
    else:
        return tl.load(at, mask=(index < count)[:, None] & (column < d)[None, :], other=0.0)


@triton.jit
def key_tile(
    x,
    b,
    h,
    start,
    left,
    stride,
    d: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    WHOLE: tl.constexpr,
    TMA: tl.constexpr,
):
    """Keys ``start : start + BN`` of one head, (BN, D): by the copy engine, or by pointers from that head's base."""
    if TMA:
        return tl.reshape(x.load([b, h, start, 0]), [BN, D])
    else:
        base = x + start.to(tl.int64) * stride
        return load_rows(base, tl.arange(0, BN), stride, left, d, D, WHOLE)


@triton.jit
def signed(x, score):
    """The operand that stays through the loop, with the sign of the scale.

    Triton feeds the matrix unit from shared memory where an operand is a plain load, from registers where it was
    computed:
    the multiplication, by a 1.0 that the compiler cannot see, is also how a kernel asks for registers.
    """
    if score.sign is not None:
        return (x * score.sign).to(x.dtype)
    else:
        return x


@triton.jit
def scored(s, score):
    """Scores in units of ln 2 from the products ``s`` = q.k; the bias is added by ``biased``."""
    if score.softcap is not None:
        return (score.softcap * LOG2E) * tanh(s * (score.scale / score.softcap))
    else:
        return s * (score.scale * LOG2E)


@triton.jit
def biased(s, score, b, h, key, keys):
    """Scores plus the key bias; ``h`` and ``key`` broadcast to the shape of ``s``."""
    if score.bias is not None:
        at = b.to(tl.int64) * score.bias_batch + h.to(tl.int64) * score.bias_head + key
        return s + tl.load(score.bias + at, mask=(key + 0 * h) < keys, other=0.0)
    else:
        return s


@triton.jit
def tanh(x):
    """tanh by one exponential of a negative number, so that it cannot overflow; near 0, where 1 - e cancels, by series.

    The series (to x^9) is off by 1e-8 of tanh at 1/4, the quotient by a few eps / tanh(1/4).
    """
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    quotient = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    y = x * x
    series = x + x * y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0))))
    return tl.where(y < 0.0625, series, quotient)


class Strides(NamedTuple):
    """Strides of batch, head and position; the last dimension is contiguous."""

    batch: int
    head: int
    position: int


def strides(x: Tensor) -> Strides:
    """The strides of ``x`` (batch, head, position, d), or of (position, d) and (batch, position, d) without heads."""
    if x.dim() == 4:
        return Strides(x.stride(0), x.stride(1), x.stride(2))
    batch = x.stride(0) if x.dim() == 3 and x.shape[0] > 1 else 0
    return Strides(batch, 0, x.stride(-2))
