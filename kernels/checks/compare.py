"""Hold an engine to the definition, its errors bounded by what an eager computation itself loses.

An engine passes where its largest error against the float64 definition is at most twice that of a plain eager
computation in low precision on the same input (flash-attention's own test), plus a few float32 roundings. No tolerance
is chosen by hand, so a harder input allows more and an easier one less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.kernels.checks.cases import Case
from headscope.kernels.request import Reduced, Request

ROUNDINGS = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Verdict:
    """The largest error of one result and what was allowed."""

    name: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """False for a NaN, too."""
        return self.error <= self.allowed


def compare(ours: Reduced, case: Case, request: Request, *, precision: torch.dtype | None = None) -> list[Verdict]:
    """Verdicts on every result that ``request`` asks for.

    ``precision``: what the engine claims to compute statistics in (default: the inputs'). The output is held to the
    inputs' precision, in which it is returned.
    """
    truth = case.eager(request)
    low = case.eager(request, precision or case.q.dtype)
    verdicts = []
    results, rounded = tensors(ours), tensors(low)
    for name, want in tensors(truth).items():
        got, lossy = results.get(name), rounded[name]
        if got is None or ("count" not in name and got.shape != want.shape):
            verdicts.append(Verdict(name, float("nan"), 0.0))
        elif "count" in name:
            verdicts.append(Verdict(name, float((got.expand_as(want) != want).sum()), 0.0))
        elif name == "top_keys":
            verdicts.append(_top_keys(ours, truth, low, case, request))
        else:
            if name == "output":
                lossy = tensors(case.eager(request, case.q.dtype))[name].to(case.v.dtype)
            # a weight exp(s - lse) carries the roundings of s; a distance sums weights times differences of positions
            size = case.score_size() * (case.k.shape[2] if "distance" in name else 1)
            verdicts.append(Verdict(name, distance(got, want), allowed(lossy, want, size=size)))
    return verdicts


def tensors(reduced: Reduced) -> dict[str, Tensor]:
    """All that was computed, by name: ``columns[0].sum`` is the sum of the first range of queries."""
    found = {name: x for name, x in vars(reduced).items() if isinstance(x, Tensor)}
    for n, column in enumerate(reduced.columns):
        found |= {f"columns[{n}].{name}": x for name, x in vars(column).items() if x is not None}
    return found


def allowed(lossy: Tensor, truth: Tensor, *, size: float = 1.0) -> float:
    """The error an engine may make where eager attention computed ``lossy`` for ``truth`` from terms up to ``size``."""
    finite = truth[torch.isfinite(truth)].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return 2.0 * distance(lossy, truth) + ROUNDINGS * max(size, largest)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinities must agree, and NaN is returned where either holds one."""
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    return float(torch.where(a == b, 0.0, (a - b).abs()).max())


def _top_keys(ours: Reduced, truth: Reduced, low: Reduced, case: Case, request: Request) -> Verdict:
    """Reported keys must hold, in the exact pattern, the mass of the true ones (ties may be broken either way)."""
    keys, mass = ours.top_keys, truth.top_mass
    assert keys is not None and mass is not None and low.top_mass is not None
    p = case.pattern()
    if request.query_rows is not None:
        p = p[:, :, request.query_rows]
    at = (keys - case.mask.key_offset).clamp(0, max(0, p.shape[-1] - 1))
    held = p.gather(-1, at) * (keys >= 0)
    ordered = keys.sort(-1).values
    repeated = int(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).sum())
    return Verdict("top_keys", distance(held, mass) + repeated, allowed(low.top_mass, mass))
