"""Attention whose mass is moved between keys after softmax, put together from attention over sets of keys.

1. Attention over a set S alone has the pattern exp(s - lse_S); the whole pattern is w_S times that on each set, with
   w the softmax of the sets' lse (and of a sink logit).
2. After the edit it is W_S times that (``redistribution``).
3. Sums of the pattern, of which the output is one, are sums over sets: X = sum_S W_S X_S. As every term is added and
   none taken away, nothing cancels where a sink held nearly all the mass.
4. The entropy is H = sum_S (W_S H_S - W_S log W_S); the heaviest keys are among the heaviest of each set; a column of
   W_S exp(s - lse_S) is that of a pattern whose lse is lse_S - log W_S (``columns``). Scores, so lse and max, stay.

A set is a slice of the keys and a bias that hides the others in it, so no kernel is needed: up to three passes for one
move (three times as many with each further one), and as many for columns. Where a set fills little of its slice and
the request allows, its keys are gathered first (``gathered``). A set of a few keys, a sink say, beside a larger one
needs no pass where only the output is asked for: its scores are computed by themselves, and its share is added to the
other sets' output (``triton.few_keys``). Definition: ``redistribution.dense``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from headscope.kernels import attention, gathered, reference
from headscope.kernels.columns import columns
from headscope.kernels.fallback import falls_back
from headscope.kernels.redistribution import Move
from headscope.kernels.request import Columns, Reduced, ReducedColumns, Request
from headscope.kernels.scores import Scores
from headscope.kernels.streaming.counts import count_columns
from headscope.kernels.streaming.weights import log_tile

if TYPE_CHECKING:  # needs Triton
    from headscope.kernels.triton.few_keys import Few

MOST_FEW = 64  # keys of a set whose scores are kept instead of its output: as much memory as heads 128 wide take
SUMS = ("output", "entropy", "linear", "distance", "window_mass", "window_distance", "target_mass")
ROWS = ("lse", "max", *SUMS[1:], "top_mass", "top_keys")


def redistribute(
    scores: Scores,
    v: Tensor,
    move: Move,
    *,
    request: Request,
    engine: attention.Engine = "auto",
) -> Reduced:
    """``attention.attend`` with the mass moved: the output and every reduction of the edited pattern.

    ``v`` (batch, kv_head, key, d_value); ``lse`` and ``max`` are of the scores, which do not change. The
    output keeps its gradient where q, k, v, sinks, bias or ``keep`` require one: it is then computed densely. Raises
    ValueError where ``move`` does not fit.
    """
    scores.check(v)
    attention.check_request(scores, request)
    move.check(*scores.shape)
    out = None
    kept = [part.keep for part in move.parts if isinstance(part.keep, Tensor)]
    if request.output and attention.wants_gradient(scores, v, *kept):
        out = _differentiable_output(scores, v, move)
        request = replace(request, output=False)
    result, by_key = Reduced(), any(each.weighs for each in request.columns)
    if request.output or request.wants_rows or by_key:
        rows = None if request.output or by_key else request.query_rows
        parts = _attended(scores, v, move, replace(request, query_rows=rows), engine)
        asked = request if rows is None else replace(request, query_rows=None)
        result = _summed(parts, scores.sinks, v, asked, engine)
        if by_key:
            result.columns = tuple(_reduce_columns(scores.shape, parts, each, engine) for each in request.columns)
    result.columns = result.columns or tuple(ReducedColumns() for _ in request.columns)
    count_columns(request, result, scores)
    result.output = result.output if out is None else out
    return result


def _differentiable_output(scores: Scores, v: Tensor, move: Move) -> Tensor:
    """The output by steps 1 to 3, every set a dense softmax of its own."""
    q, wide = scores.q, scores.dtype
    s = reference.dense_scores(replace(scores, q=q.to(wide), k=scores.k.to(wide)))
    sets = [s.masked_fill(~chosen[:, :, None], -torch.inf) for chosen in move.sets(q.device)]
    norms = [torch.logsumexp(x, -1) for x in sets]
    values = v.to(wide).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    after = move.after(norms, scores.sinks)
    terms = (w[..., None] * (reference.normalise(x, None) @ values) for x, w in zip(sets, after, strict=True))
    return reduce(torch.add, terms).to(v.dtype)


@torch.no_grad()
def pattern(
    scores: Scores,
    move: Move,
    *,
    rows: slice = slice(None),
    keys: slice = slice(None),
) -> Tensor:
    """One exact tile of the edited pattern: rows ``rows`` and keys ``keys``, as ``attention.pattern`` gives it."""
    scores.check()
    move.check(*scores.shape)
    rows, keys = attention.whole_slice(rows, scores.shape[2]), attention.whole_slice(keys, scores.shape[3])
    scores, move = scores.rows(rows), move.of_rows(rows)
    batch, heads, queries, _ = scores.shape
    out = torch.zeros(batch, heads, queries, keys.stop - keys.start, dtype=scores.dtype, device=scores.q.device)
    if not out.numel():
        return out
    parts = _attended(scores, scores.k, move, Request(output=False), "auto")
    for part in parts:
        a, b = max(keys.start, part.keys.start), min(keys.stop, part.keys.stop)
        if a < b:
            inside = slice(a - part.keys.start, b - part.keys.start)
            tile = log_tile(part.scores, part.norm, slice(0, queries), inside)
            out[..., a - keys.start : b - keys.start] += tile.exp_()
    return out


class _Part(NamedTuple):
    """Attention over a set: the slice of the keys that holds it, that slice's scores, with a bias that hides its other
    keys, what was found, its lse, its few keys' scores where there is no output, and its mass W after the edit (batch,
    head, query)."""

    keys: slice
    scores: Scores
    found: Reduced
    lse: Tensor
    few: Few | None
    mass: Tensor

    @property
    def norm(self) -> Tensor:
        """The lse of the set's weights after the edit: exp(s - norm) is W exp(s - lse)."""
        return torch.where(self.mass > 0, self.lse - self.mass.log(), torch.inf)


@torch.no_grad()
def _attended(scores: Scores, v: Tensor, move: Move, request: Request, engine: attention.Engine) -> list[_Part]:
    """Steps 1 and 2: every set of ``move``, of the rows asked for."""
    asked = replace(request, lse=True, columns=())
    sets = move.sets(scores.q.device)
    sizes, found = _sizes(sets), {}
    gather = gathered.gathers(scores, v, request, engine)
    largest, *rest = sorted(range(len(sets)), key=lambda n: -sizes[n][2])
    for n in (largest, *rest):  # the largest while no other result takes memory
        chosen, (keys, least, most) = sets[n], sizes[n]
        here = replace(scores.keys(keys), sinks=None)
        if least < keys.stop - keys.start:
            hidden = 0.0 if here.bias is None else here.bias
            here = replace(here, bias=torch.where(chosen[..., keys], hidden, -torch.inf))
        got = few = None
        if gather and n != largest and most <= MOST_FEW and _asks_output_alone(request):
            from headscope.kernels.triton.few_keys import few_scores

            with falls_back("attention over the set"):
                few = few_scores(scores, chosen, most)
                got = Reduced(lse=few.lse)
        if got is None and gather and 0 < most <= gathered.WORTH * (keys.stop - keys.start):
            with falls_back("attention in which the set's other keys are hidden"):
                got = gathered.attend(scores, v, chosen, most, request=asked)
        if got is None:
            linear = None if asked.linear is None else asked.linear[..., keys, :]
            got = attention.attend(here, v[:, :, keys], request=replace(asked, linear=linear), engine=engine)
        assert got.lse is not None
        found[n] = keys, here, got, got.lse, few
    norms = [found[n][3] for n in range(len(sets))]
    move = move if request.query_rows is None else move.of_rows(request.query_rows)
    return [_Part(*found[n], mass) for n, mass in enumerate(move.after(norms, scores.sinks))]


def _asks_output_alone(request: Request) -> bool:
    """Whether no statistic of a set is asked for, of what can be ``gathered``."""
    return request.output and not (request.max or request.entropy)


def _sizes(sets: list[Tensor]) -> list[tuple[slice, int, int]]:
    """Of every set (batch or 1, head or 1, key): the slice of the keys that holds it, and how many keys an example and
    head has in it, the fewest and the most. The device is asked once, before it has work to wait for."""
    if not sets[0].numel():
        return [(slice(0, 0), 0, 0)] * len(sets)
    every = torch.stack(torch.broadcast_tensors(*sets)).flatten(1, 2)
    some, counts = every.any(1).int(), every.sum(-1)
    numbers = some.argmax(-1), some.flip(-1).argmax(-1), *counts.aminmax(dim=-1)
    length = every.shape[-1]
    return [  # without a key: one that is hidden
        (slice(first, length - last) if most else slice(0, 1), least, most)
        for first, last, least, most in torch.stack(numbers, -1).tolist()
    ]


def _summed(parts: list[_Part], sinks: Tensor | None, v: Tensor, request: Request, engine: attention.Engine) -> Reduced:
    """Steps 3 and 4: the output, in the values' type, and the rows."""
    result = Reduced(output=_output(parts, v, engine))
    if request.lse:
        result.lse = reference.log_total(torch.stack([part.lse for part in parts], -1), sinks)
    for name in SUMS if result.output is None else SUMS[1:]:
        if getattr(parts[0].found, name) is not None:
            setattr(result, name, _sum(parts, name))
    if result.entropy is not None:
        result.entropy = reduce(torch.add, (torch.special.entr(part.mass) for part in parts), result.entropy)
    if request.max:
        result.max = torch.stack([part.found.max for part in parts if part.found.max is not None]).amax(0)
    if request.top:
        mass = torch.cat(list(_terms(parts, "top_mass")), -1)
        keys = torch.cat([part.found.top_keys for part in parts if part.found.top_keys is not None], -1)
        result.top_mass, at = mass.topk(request.top, dim=-1)
        result.top_keys = keys.gather(-1, at).masked_fill(result.top_mass <= 0, -1)
    if request.query_rows is not None:
        for name in ROWS:
            x = getattr(result, name)
            setattr(result, name, None if x is None else x[:, :, request.query_rows])
    result.output = None if result.output is None else result.output.to(v.dtype)
    return result


def _output(parts: list[_Part], v: Tensor, engine: attention.Engine) -> Tensor | None:
    """The output, where it was asked for and a Triton kernel adds it up: every set's is read once, in its own type."""
    passes = [part for part in parts if part.found.output is not None]
    few = [part for part in parts if part.few is not None]
    if not passes or not (few or attention.uses_triton(engine, parts[0].scores)):
        return None
    from headscope.kernels.triton.shares import add_shares

    outputs = [part.found.output.contiguous() for part in passes if part.found.output is not None]
    total, share = None, passes[0].mass
    if len(passes) == 1 and few:
        total = outputs[0]  # takes the sum: nothing else is read of it
    else:
        with falls_back("PyTorch"):
            add_shares(outputs, [part.mass for part in passes], outputs[0])
            total = outputs[0]
    if few and total is None:
        total = _sum(passes, "output")
    for n, part in enumerate(few):
        assert total is not None
        total = _with_few(part, v, share if n == 0 and len(passes) == 1 else None, total)
    return total


def _with_few(part: _Part, v: Tensor, share: Tensor | None, output: Tensor) -> Tensor:
    """``output`` times ``share`` (None: 1), and what the few keys of ``part`` give."""
    from headscope.kernels.triton.few_keys import add_few

    few = part.few
    assert few is not None
    with falls_back("PyTorch"):
        add_few(few, part.norm, v, share, output)
        return output
    batch, heads, _, n = few.scores.shape
    index = few.which.clamp(min=0).long()[..., None].expand(batch, heads, n, v.shape[3])
    values = v.repeat_interleave(heads // v.shape[1], 1).gather(2, index).float()
    weights = torch.exp2(few.scores - part.norm[..., None] * math.log2(math.e))
    return (output if share is None else output * share[..., None]) + weights @ values


def _sum(parts: list[_Part], name: str) -> Tensor:
    """What ``_terms`` gives, added up without a tensor for each."""
    total = parts[0].mass.new_zeros(())
    for part in parts:
        x = getattr(part.found, name)
        total = torch.addcmul(total, x, part.mass.view(part.mass.shape + (1,) * (x.dim() - 3)))
    return total


def _terms(parts: list[_Part], name: str) -> Iterator[Tensor]:
    """The result ``name`` (batch, head, query, ...) of every set, times the set's mass."""
    for part in parts:
        x = getattr(part.found, name)
        yield x * part.mass.view(part.mass.shape + (1,) * (x.dim() - 3))


def _reduce_columns(
    shape: tuple[int, int, int, int], parts: list[_Part], want: Columns, engine: attention.Engine
) -> ReducedColumns:
    """Step 4 for the columns of a call of ``shape`` (batch, head, query, key)."""
    zero = parts[0].mass.new_zeros(shape[0], shape[1], shape[3])
    result = ReducedColumns(zero if want.sum else None, zero.clone() if want.max else None)
    if not want.weighs:
        return result
    for part in parts:
        options: dict[str, Any] = {"total": want.sum, "highest": want.max, "queries": want.queries}
        found = columns(part.scores, part.norm, engine=engine, **options)
        if result.sum is not None and found.sum is not None:
            result.sum[..., part.keys] += found.sum
        if result.max is not None and found.max is not None:
            here = result.max[..., part.keys]
            torch.maximum(here, found.max, out=here)
    return result
