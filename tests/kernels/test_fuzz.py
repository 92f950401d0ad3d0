"""Random calls of every engine against the float64 definition, within the derived bound of ``checks.compare``.

    HEADSCOPE_FUZZ=10000 HEADSCOPE_FUZZ_SEED=1 TRITON_INTERPRET=1 pytest tests/kernels/test_fuzz.py

Every call goes to the streaming engine, every fiftieth to the Triton kernels too, block maps and divergences with it:
Triton's interpreter takes seconds a call, a card's compiler as long. 2,000 calls without ``HEADSCOPE_FUZZ``; a failure
names the number of its call: ``draw(number)`` is that call again.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the Triton engine is an optional extra")

from headscope.kernels import gpu_engine
from headscope.kernels.blocks import blocks, dense
from headscope.kernels.checks.cases import MASKS, Case, everything, random_case, random_edits
from headscope.kernels.checks.compare import allowed, compare, distance
from headscope.kernels.divergence import dense as dense_divergence
from headscope.kernels.divergence import divergence
from headscope.kernels.request import Request
from headscope.kernels.streaming import engine as streaming

CALLS = int(os.environ.get("HEADSCOPE_FUZZ", "2000"))
FIRST = 1_000_000 * int(os.environ.get("HEADSCOPE_FUZZ_SEED", "0"))
EVERY = 50  # of them, one is Triton's
TOGETHER = 500  # calls of a test
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(number: int) -> tuple[dict[str, Any], Case, Request]:
    """Call ``number``: what it was made of, and what is asked of it."""
    pick = random.Random(number)
    keys = pick.choice([pick.randint(1, 40), pick.randint(30, 140)])
    queries = pick.choice([1, 2, keys, pick.randint(1, keys)])
    sides = [0, pick.randint(0, keys), pick.choice([15, 16, 17, 31, 32, 33, 63, 64, 65])]
    spec = {
        "kind": pick.choice(MASKS),
        "batch": pick.randint(1, 2),
        "kv_heads": pick.randint(1, 2),
        "group": pick.randint(1, 3),
        "queries": queries,
        "keys": keys,
        "d_head": pick.choice([8, 16, 20, 33, 64, 80]),
        "d_value": pick.choice([None, 16, 24, 72]),
        "dtype": pick.choice([torch.float16, torch.float32]),
        "softcap": pick.choice([None, None, 2.0, 30.0]),
        "sinks": pick.random() < 0.3,
        "bias": pick.random() < 0.3,
        "padding": pick.choice([None, (min(pick.choice(sides), keys), 0), (0, min(pick.choice(sides), keys))]),
    }
    case = random_case(**spec, seed=number, device=DEVICE)
    if pick.random() < 0.2:
        case = replace(case, scale=-case.scale)
    if pick.random() < 0.3:
        edits = random_edits(case, seed=number)
        spec["edit"] = pick.choice(sorted(edits))
        case = replace(case, edit=edits[spec["edit"]])
    some = {"seed": number, "subset": pick.random() < 0.3, "top": pick.choice([0, 1, 5])}
    whole = everything(case, **some, features=pick.choice([0, 1, 3, 25]))
    if pick.random() < 0.7:  # fewer reductions in a pass are other kernels
        empty = Request()
        kept = {name: getattr(empty, name) for name in vars(whole) if pick.random() < 0.6}
        kept.pop("query_rows", None), kept.pop("key_queries", None)
        whole = replace(whole, **kept)
    return spec | some | {"scale": case.scale}, case, whole


def outside(number: int, engine: str) -> list[str]:
    """Results of call ``number`` that are out of bounds."""
    spec, case, request = draw(number)
    # streaming computes in float32 whatever the inputs' type, but for float16 on a card; both are held to eager's
    attend = {"triton": gpu_engine.attend, "streaming": streaming.attend}[engine]
    verdicts = compare(case.run(attend, request), case, request)
    return [f"call {number} {spec}: {engine} {v}" for v in verdicts if not v.holds]


def pairs(number: int) -> list[str]:
    """What is out of bounds where Triton pools the map of call ``number``, and compares it with another."""
    spec, case, _ = draw(number)
    found = []
    size, pool = random.Random(number).choice([(7, "sum"), (16, "max"), (32, "mean"), (100, "sum")])
    got = blocks(case, size=size, pool=pool, engine="triton")
    want, low = (dense(case.pattern(x).double(), case.mask, size, pool) for x in (torch.float64, case.q.dtype))
    if not distance(got, want) <= allowed(low, want, size=case.score_size()):
        found.append(f"blocks {size} {pool}: {distance(got, want)}")
    if case.bias is None:
        other = replace(case, q=case.q.flip(1), k=case.k.flip(1))
        apart = divergence(case, other, engine="triton")
        exact = dense_divergence(case.log_pattern(), other.log_pattern())
        eager = dense_divergence(case.log_pattern(case.q.dtype), other.log_pattern(case.q.dtype))
        for field, x, y, z in zip(apart._fields, apart, exact, eager, strict=True):
            if not distance(x, y) <= allowed(z, y, size=case.score_size()):
                found.append(f"{field}: {distance(x, y)} of {allowed(z, y, size=case.score_size())}")
    return [f"call {number} {spec}: {line}" for line in found]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FIRST, FIRST + CALLS, TOGETHER))
def test_random_calls(first: int) -> None:
    numbers = range(first, min(first + TOGETHER, FIRST + CALLS))
    found = [line for number in numbers for line in outside(number, "streaming")]
    found += [line for number in numbers[::EVERY] for line in outside(number, "triton") + pairs(number)]
    assert not found, "\n".join(found)
