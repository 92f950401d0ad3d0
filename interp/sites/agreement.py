"""How far two right computations of one attention call may differ: rounding, derived and element by element.

1. A score is scale q.k. A sum of d_head products in precision u is off by at most d_head u |q||k| (Higham 2002, 3.1),
   and everything else that happens to a score (q and k scaled beforehand, the product scaled, softcap, bias, the row's
   maximum subtracted) rounds it at most ten times. Two computations differ by

       delta = reach (10 eps + d_head eps_sum),   reach = scale max|q| max|k| + max|bias|,

   eps of the inputs' precision, where eager code keeps its scores, eps_sum of the precision that sums are taken in.
2. log p = s - logsumexp(s) then differs by 2 delta; exponential, sum over the keys, division and rounding add the rest:

       |p - p'| <= p (exp(2 delta) - 1 + keys eps_sum + 8 eps).

   Being relative to p, it proves the mask whatever the scores are: a hidden key's p is exactly 0. What one of them
   flushes to 0 and the other keeps is added (``_floor``).
3. An output is a sum of p v, so it differs by the same share of sum(p |v|), and the sum's own rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall

_FLOAT32_EPS = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}  # what torch's float32 products may round to
_LARGEST_EXPONENT = 80.0  # exp stays a float
_HIDES = -1e4  # a bias that hides its key instead of weighing it


@dataclass(frozen=True)
class Difference:
    """The largest difference of two computations of ``what``, and the largest as a share of its bound, with where that
    is and what stands there."""

    what: str
    size: float
    share: float
    seen: str = ""


def compare_call(call: AttentionCall, output: Tensor, run: Callable[[Tensor], Tensor]) -> Iterator[Difference]:
    """Compare a call with another computation of it, on the queries that are not padding.

    ``output`` (batch, query, head, d_value) is what that computation gave, ``run`` repeats it with other values. Values
    that are one-hot rows make its output the pattern's columns; as many as d_value, the first and the last, are seen.
    """
    keys, width = call.key.shape[2], call.value.shape[-1]
    rows = torch.arange(call.query.shape[2], device=call.query.device)
    real = call.mask.query_is_real(rows)
    keep = torch.ones(1, rows.numel(), dtype=torch.bool, device=rows.device) if real is None else real
    keep = keep.expand(call.query.shape[0], -1)
    for first in sorted({0, max(0, keys - width)}):
        stop = min(keys, first + width)
        one_hot = torch.zeros_like(call.value)
        index = torch.arange(stop - first, device=rows.device)
        one_hot[:, :, first + index, index] = 1
        ours = call.pattern(keys=slice(first, stop))
        theirs = run(one_hot)[..., : stop - first]
        yield _difference("the pattern", theirs, ours, pattern_bound(call, ours), keep, first)
    yield _difference("the output", output, call.output(), output_bound(call), keep, 0)


def _difference(what: str, theirs: Tensor, ours: Tensor, bound: Tensor, keep: Tensor, first: int) -> Difference:
    """``theirs`` (batch, query, head, ·), ``ours`` and ``bound`` (batch, head, query, ·), the last from ``first``; rows
    ``keep`` (batch, query) count."""
    sizes = (theirs.float() - ours.transpose(1, 2).float()).abs()[keep]
    if not sizes.numel():
        return Difference(what, 0.0, 0.0)
    bound = bound.transpose(1, 2)[keep].clamp(min=1e-38)  # values that are all zero have the bound zero
    shares = (sizes / bound).nan_to_num(torch.inf)  # (row, head, key or feature)
    row, head, last = (int(i) for i in torch.unravel_index(shares.argmax(), shares.shape))
    example, query = (int(i) for i in keep.nonzero()[row])
    their, our = float(theirs[keep][row, head, last]), float(ours.transpose(1, 2)[keep][row, head, last])
    where = (
        f"example {example}, head {head}, query {query}, {'key' if what == 'the pattern' else 'feature'} {first + last}"
    )
    return Difference(what, float(sizes.max()), float(shares.max()), f"{their:.3g} for our {our:.3g} at {where}")


def relative_error(call: AttentionCall) -> float:
    """The bound on ``|p - p'| / p`` for two right computations of a call; above 1 it says nothing of visible keys."""
    sums = _eps(torch.promote_types(call.query.dtype, torch.float32))
    eps = max(_eps(call.query.dtype), sums)
    reach = float(call.query.float().norm(dim=-1).amax() * call.key.float().norm(dim=-1).amax()) * abs(call.scale)
    if call.position_bias is not None:
        bias = call.position_bias.float()
        reach += float(bias.masked_fill(bias < _HIDES, 0.0).abs().amax())
    delta = reach * (10.0 * eps + call.query.shape[-1] * sums)
    return math.expm1(min(2.0 * delta, _LARGEST_EXPONENT)) + call.key.shape[2] * sums + 8.0 * eps


def pattern_bound(call: AttentionCall, pattern: Tensor) -> Tensor:
    """How far another computation of ``pattern`` (a tile of ours) may be from it."""
    return pattern * relative_error(call) + _floor(call)


def output_bound(call: AttentionCall) -> Tensor:
    """How far another computation of the heads' outputs (batch, head, query, d_value) may be from ours."""
    keys = call.key.shape[2]
    sums = _eps(torch.promote_types(call.value.dtype, torch.float32))
    magnitude = call.with_(value=call.value.abs()).output().float()
    largest = float(call.value.float().abs().amax()) if call.value.numel() else 0.0
    return magnitude * (relative_error(call) + keys * sums) + keys * _floor(call) * largest


def _eps(dtype: torch.dtype) -> float:
    return _FLOAT32_EPS[torch.get_float32_matmul_precision()] if dtype == torch.float32 else torch.finfo(dtype).eps


def _floor(call: AttentionCall) -> float:
    """Below this a probability may have been flushed to zero.

    exp(s - m), at most 1, is made as 2^n 2^f. A fast exponential rounds n to the nearest whole number and gives zero
    where that is the smallest exponent of normal numbers or less: then the value is below sqrt(2) times the smallest.
    What comes after, a rescaling to a later maximum or a division by the sum, is a factor of at most 1.
    """
    return math.sqrt(2.0) * torch.finfo(call.query.dtype).smallest_normal


@dataclass(eq=False)
class Verification:
    """What the check saw: attention calls, sites, layers, and the largest disagreement relative to its bound."""

    calls: int = 0
    layers: dict[str, list[int]] = field(default_factory=dict)
    worst: float = 0.0
    largest_difference: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every call agreed."""
        return self.calls > 0 and not self.problems

    def add(self, other: Verification) -> None:
        """Take in what another run of the check saw; ``layers`` are those of each module's fullest run."""
        self.calls += other.calls
        for name, layers in other.layers.items():
            self.layers[name] = max(self.layers.get(name, []), layers, key=len)
        self.worst = max(self.worst, other.worst)
        self.largest_difference = max(self.largest_difference, other.largest_difference)
        self.problems += other.problems

    def note(self, call: AttentionCall, differences: Iterable[Difference], hint: str = "") -> None:
        """Take in what comparing one call gave; ``hint`` says why it may differ."""
        for seen in differences:
            self.largest_difference = max(self.largest_difference, seen.size)
            self.worst = max(self.worst, seen.share)
            if not seen.share <= 1.0:
                self.problems.append(
                    f"{seen.what} of layer {call.layer} ({call.query.dtype}) differs from ours, {seen.seen}, "
                    f"{seen.share:.3g} times what rounding can do{hint}"
                )
