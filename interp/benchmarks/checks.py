"""Whether a traced long pass is right: its last query by dense float32 attention, and sums that must come out.

What attention gives the last recorded query is computed again from the call's own tensors, one head's keys at a time:
that query sees (nearly) every key, so a tile of keys left out or seen twice shows in its output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler

NATS = (
    1e-4  # of lse and entropy: scores of size 10 as float32 sums of 128 products are within 128 * 2**-24 * 10 at worst
)
HALF = 2.0**-8  # twice the unit roundoff of bfloat16
OUTPUT = 4 * HALF  # p and v p are rounded to bfloat16 once each: 1 unit of independent errors, 4 as a margin
MASS = 1e-4  # of a sum of float32 weights whose lse is within NATS


@dataclass
class OneQuery(Handler):
    """Computes the query at ``position`` again in ``layers`` of a causal model; changes nothing."""

    layers: tuple[int, ...]
    position: int

    def __post_init__(self) -> None:
        self.found: dict[int, dict[str, Tensor]] = {}

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """Look at what the heads give; ``z`` stays as it is."""
        row = self.position - call.mask.query_offset
        if call.layer in self.layers and 0 <= row < call.query.shape[2]:
            self.found[call.layer] = dense(call, z, row)
        return z


def dense(call: AttentionCall, z: Tensor, row: int) -> dict[str, Tensor]:
    """lse and entropy (head,) of one query by float32 products and float64 sums; how far ``z`` is off, relative."""
    group, seen = call.query.shape[1] // call.key.shape[1], call.mask.query_offset + row + 1
    lse, entropy, off = [], [], []
    for h in range(call.key.shape[1]):
        heads = slice(h * group, (h + 1) * group)
        s = (call.query[0, heads, row].float() @ call.key[0, h, :seen].float().T * call.scale).double()
        norm = s.logsumexp(-1, keepdim=True)
        p = (s - norm).exp()
        exact = p.float() @ call.value[0, h, :seen].float()
        lse.append(norm[:, 0])
        entropy.append(-(p * (s - norm)).sum(-1))
        off.append((z[0, heads, row].float() - exact).norm(dim=-1) / exact.norm(dim=-1))
    return {"lse": torch.cat(lse), "entropy": torch.cat(entropy), "output": torch.cat(off)}


def compare(record: xr.Dataset, one: OneQuery, tokens: int) -> list[dict[str, Any]]:
    """Every check of a traced pass over ``tokens`` tokens: what, how large, the bound, and whether it passed."""
    checks = [_check("layers in which the query was not seen", len(one.layers) - len(one.found), 0)]
    at = np.flatnonzero(record["query_position"].to_numpy()[0] == one.position)[0]
    for layer, seen in one.found.items():
        row = record.sel(layer=layer).isel(example=0, query=at)
        for name, truth in (("logsumexp", seen["lse"]), ("entropy", seen["entropy"])):
            size = np.abs(row[name].to_numpy() - truth.cpu().numpy()).max()
            checks.append(_check(f"{name} of query {one.position}, layer {layer}, nats", size, NATS))
        checks.append(_check(f"output of query {one.position}, layer {layer}, relative", seen["output"].max(), OUTPUT))
    unfinished = sum(int((~np.isfinite(layer)).sum()) for layer in record["logsumexp"].to_numpy()[0])
    checks.append(_check("values of logsumexp that are not finite", unfinished, 0))
    if "key_mass" in record:  # every query gives away 1
        total = record["key_mass"].astype(np.float64).sum("key").to_numpy() / tokens
        checks.append(_check("mass of all keys a query, from 1", np.abs(total - 1).max(), MASS))
    return checks


def compare_logits(found: Tensor, plain: Tensor, layers: int) -> dict[str, Any]:
    """Logits of the last token against untraced ones, relative.

    Both round the residual stream to bfloat16 twice a layer, independently: errors of about sqrt(2 layers) roundings,
    4 as a margin.
    """
    size = float((found - plain).norm() / plain.norm())
    return _check("logits of the last token, relative", size, 4 * HALF * math.sqrt(2 * layers))


def _check(what: str, size: Any, bound: float) -> dict[str, Any]:
    return {"what": what, "size": float(size), "bound": bound, "passed": bool(size <= bound)}
