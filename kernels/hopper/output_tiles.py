"""What a group of ``hopper.output`` does with a tile: multiply, take exponentials, add to its sums.

The sums are (state of the softmax, weights that are still to be multiplied with their values, output, linear).
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from headscope.kernels.hopper.bias import products
from headscope.kernels.hopper.device import absorb, scaled, skip
from headscope.kernels.hopper.features import enter, leave, run_of, weigh

ABSENT = gl.constexpr(0)  # features: there are none;
BESIDE = gl.constexpr(1)  # their product is issued beside that of the values;
APART = gl.constexpr(2)  # tiles are asked whether they need one


@gluon.jit
def skip_both(n, keys, bars, BN: gl.constexpr):
    """Pass on the tiles of ``keys`` keys that a group does not see, from the n-th: the next n.

    One after the other, as they come: values that wait for room would else wait for ever behind keys that do.
    """
    _q_ready, k_ready, k_free, v_ready, v_free = bars
    for passed in range(0, keys, BN):
        skip(n + passed // BN, BN, k_ready, k_free, BN)
        skip(n + passed // BN, BN, v_ready, v_free, BN)
    return n + gl.cdiv(gl.maximum(keys, 0), BN)


@gluon.jit
def _scores(n, q, smem, ready):
    """Issue the product of the queries and the n-th tile of keys, once it is there."""
    _q_smem, k_smem, _v_smem, _f_smem, bias = smem
    STAGES: gl.constexpr = k_smem.shape[0]
    mbarrier.wait(ready.index(n % STAGES), n // STAGES & 1)
    return products(q, k_smem, n % STAGES, bias)


@gluon.jit
def multiply(p, stage, smem, output, linear, F: gl.constexpr):
    """Issue the products of weights ``p`` with a tile's values and, ``BESIDE``, with its features."""
    _q_smem, _k_smem, v_smem, f_smem, _bias = smem
    o_ = warpgroup_mma(p, v_smem.index(stage).reshape([v_smem.shape[3], v_smem.shape[4]]), output, is_async=True)
    f_ = linear
    if F == BESIDE:
        f = f_smem.index(stage).reshape([f_smem.shape[2], f_smem.shape[3]])
        f_ = warpgroup_mma(
            gl.convert_layout(p, gl.DotOperandLayout(0, linear.type.layout, 2)), f, linear, is_async=True
        )
    return o_, f_


@gluon.jit
def wait_for(o_, f_, F: gl.constexpr):
    """Wait for what ``multiply`` issued."""
    if F == BESIDE:
        return warpgroup_mma_wait(0, deps=[o_, f_])
    else:
        return warpgroup_mma_wait(0, deps=[o_]), f_


@gluon.jit
def _at_once(n, start, q, smem, bars, position, sums, given, MASKED: gl.constexpr, F: gl.constexpr):
    """The n-th tile of keys, its weights multiplied with its values: the next n, and the sums."""
    _q_ready, k_ready, k_free, v_ready, v_free = bars
    state, nothing, output, linear = sums
    b, h, sizes, rules, results, score = given
    STAGES: gl.constexpr = smem[1].shape[0]
    stage = n % STAGES
    s = warpgroup_mma_wait(0, deps=[_scores(n, q, smem, k_ready)])
    mbarrier.arrive(k_free.index(stage))
    p, a, state = absorb(s, state, position, start, b, h, sizes, rules, results, score, True, MASKED)
    p = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, output.type.layout, 2))
    if F == BESIDE:
        linear = scaled(linear, a)
    mbarrier.wait(v_ready.index(stage), n // STAGES & 1)
    o_, f_ = multiply(p, stage, smem, scaled(output, a), linear, F)
    output, linear = wait_for(o_, f_, F)
    mbarrier.arrive(v_free.index(stage))
    return n + 1, (state, nothing, output, linear)


@gluon.jit
def _one_late(n, start, q, smem, bars, position, sums, given, MASKED: gl.constexpr, F: gl.constexpr):
    """Steps 1 to 3 for the n-th tile of keys: the next n, and the sums, of which ``p`` is still to be multiplied."""
    _q_ready, k_ready, k_free, v_ready, v_free = bars
    state, p, output, linear = sums
    b, h, sizes, rules, results, score = given
    STAGES: gl.constexpr = smem[1].shape[0]
    last = gl.maximum(n - 1, 0)
    before = last % STAGES
    s_ = _scores(n, q, smem, k_ready)
    mbarrier.wait(v_ready.index(before), last // STAGES & 1)
    o_, f_ = multiply(p, before, smem, output, linear, F)
    s = warpgroup_mma_wait(2 if F == BESIDE else 1, deps=[s_])
    mbarrier.arrive(k_free.index(n % STAGES))
    new, a, state = absorb(s, state, position, start, b, h, sizes, rules, results, score, False, MASKED)
    output, linear = wait_for(o_, f_, F)
    mbarrier.arrive(v_free.index(before), pred=n > 0)
    output = scaled(output, a)
    p = gl.convert_layout(new.to(q.dtype), gl.DotOperandLayout(0, output.type.layout, 2))
    if F != ABSENT:
        linear = scaled(linear, a)
    if F == APART:
        mbarrier.wait(v_ready.index(n % STAGES), n // STAGES & 1)
        linear = weigh(p, smem[3].index(n % STAGES), linear)
    return n + 1, (state, p, output, linear)


@gluon.jit
def add_tile(n, start, q, smem, bars, position, sums, given, MASKED: gl.constexpr, F: gl.constexpr):
    """The n-th tile of keys: the next n, and the sums (state, weights to multiply, output, linear)."""
    if smem[0].shape[0] == 2:
        return _one_late(n, start, q, smem, bars, position, sums, given, MASKED, F)
    else:  # there is no earlier product beside which features could wait
        return _at_once(n, start, q, smem, bars, position, sums, given, MASKED, ABSENT if F == ABSENT else BESIDE)


@gluon.jit
def add_runs(n, start, to, columns, q, smem, bars, position, sums, given):
    """The whole tiles ``start:to``, of which those without mixed features leave the features' sums alone."""
    BN: gl.constexpr = smem[1].shape[3]
    FOLD: gl.constexpr = smem[0].shape[0] == 3
    while start < to:
        state, p, output, linear = sums
        until, c = run_of(columns, start, to, linear, BN)
        if until > 0:
            before = state[0]
            sums = (state, p, output, enter(linear, c, state[1], FOLD))
            for at in range(start, until, BN):
                n, sums = add_tile(n, at, q, smem, bars, position, sums, given, False, ABSENT)
            state, p, output, linear = sums
            sums = (state, p, output, leave(linear, c, before, state, FOLD))
        else:
            for at in range(start, -until, BN):
                n, sums = add_tile(n, at, q, smem, bars, position, sums, given, False, APART)
        start = gl.maximum(until, -until)
    return n, sums
