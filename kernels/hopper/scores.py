"""From products to scores, on Hopper: scale, a softcap and a key bias, in units of ln 2 (see ``triton.device``)."""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from headscope.kernels.triton.device import LOG2E as _LOG2E

LOG2E = gl.constexpr(_LOG2E.value)


@gluon.jit
def reciprocal(x):
    """1 / x, to the last bit but one; 0 of infinity."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def logarithm(x):
    """log2 of x in [1, 2], off by 2^-22 at most."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def key_bias(score, b, h, start, j, keys, MASKED: gl.constexpr):
    """The bias (key,) of keys ``start + j`` of a tile, to be fetched beneath their product; 0 without one."""
    if score.bias is not None:
        start = start // j.shape[0] * j.shape[0]  # as it is: so the compiler knows, and fetches two at once
        at = score.bias + (b.to(gl.int64) * score.bias_batch + h.to(gl.int64) * score.bias_head + start)
        if MASKED:
            return gl.load(at + j, mask=start + j < keys, other=0.0)
        else:
            return gl.load(at + j)
    else:
        return 0.0


@gluon.jit
def capped(s, score):
    """Softcap c of products ``s``, in units of ln 2: c tanh(x / c) = c - 2 c / (1 + exp(2 x / c)) of scores x.

    Off by four roundings (2^-23) of c at most. With the weight's own exponential a score takes the special-function
    unit three operations, of which it does 16 a clock: at d_head 128 a pass of rows cannot be quicker than 1.08x.
    """
    cap, ratio = score.softcap * LOG2E, score.scale / score.softcap
    return cap - 2.0 * cap * reciprocal(1.0 + gl.exp2(s * (2.0 * LOG2E * ratio)))


@gluon.jit
def scored(s, score, bias):
    """What products ``s`` come to with ``key_bias``, and by which number they are still to be multiplied to be scores
    in units of ln 2."""
    unit = score.scale * LOG2E
    if score.softcap is not None:
        s = capped(s, score)
        unit = 1.0
    if score.bias is not None:
        if score.softcap is None:
            s = s * unit
            unit = 1.0
        s += bias[None, :]
    return s, unit
