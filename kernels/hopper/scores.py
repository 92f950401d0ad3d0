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
    """Softcap c of products ``s``, in units of ln 2: c tanh(x / c) of scores x.

    Of scores up to 0.6 c by a polynomial, off by 7.3e-8 c and roundings (fitted to tanh for the least error): then the
    unit for exponentials, which bounds such kernels, has one a score and not three. If a tile holds larger ones:
    c - 2 c / (1 + exp(2 x / c)), off by two roundings of c.
    """
    cap, ratio = score.softcap * LOG2E, score.scale / score.softcap
    most = gl.max(gl.max(gl.abs(s), 1), 0)
    if (most * ratio < 0.6) & (ratio > 1e-4):  # a smaller one to the ninth is no number
        z = ratio * ratio
        y, c1 = s * s, cap * ratio
        c3, c5, c7, c9 = c1 * z * -0.3333329, c1 * z * z * 0.13321109, c1 * z * z * z * -0.0524945, c1 * z * z * z * z
        s = s * (c1 + y * (c3 + y * (c5 + y * (c7 + y * (c9 * 0.01592512)))))
    else:
        s = cap - 2.0 * cap * reciprocal(1.0 + gl.exp2(s * (2.0 * LOG2E * ratio)))
    return s


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
