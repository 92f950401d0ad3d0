"""A check of context parallelism by two processes that share one GPU, or the CPU: is its record that of one process?

    torchrun --nproc-per-node 2 -m headscope.interp.benchmarks.shared_card --shape 1b --tokens 16384 --out DIRECTORY
    torchrun --nproc-per-node 2 -m headscope.interp.benchmarks.shared_card --shape tiny --tokens 257 --device cpu

A Llama of random weights, once in float32 and once in bfloat16, is traced by every process alone and then by both under
``context_parallel``, over gloo (NCCL does not let two processes share a card). Nothing is timed. It compares

- "same calls": every call's statistics, with the same call's from its fetched tensors. Only the sums' order and the
  exchange differ, in float32 whatever the model's dtype;
- "two passes": the two records, where products of half as many rows may be rounded otherwise, layer after layer.

Numbers are shares of the tolerance (``tolerance``); one above 1 is beyond it, and then the exit code is 1. Which keys
are the heaviest is compared by their mass: keys of one mass within the tolerance come in any order.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xarray as xr
from torch import Tensor
from transformers import LlamaForCausalLM

from headscope.interp import context_parallel, trace
from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.attention.split import unsplit
from headscope.interp.benchmarks.long_context import rows
from headscope.interp.benchmarks.shapes import SHAPES, Shape, random_model
from headscope.interp.sites import attached
from headscope.interp.statistics import KeyMass, Statistic, TopKeys
from headscope.interp.statistics.exactness import Exactness
from headscope.interp.statistics.plan import Plans
from headscope.kernels.benchmarks.pages import machine
from headscope.kernels.request import Reduced, Request

SUMS = 1e-5  # two orders of a float32 sum of 64 to 128 products, or of as many tiles, are within 128 x 2**-24 of it
WIDEST = 6.0  # standard deviations that none of a billion numbers passes
PLACES = "top_keys"  # positions, which are compared by their masses


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, compare, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="of all processes")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    args = parser.parse_args(arguments)
    words = shlex.join(arguments if arguments is not None else sys.argv[1:])
    started = dist.is_initialized()
    if not started:
        dist.init_process_group("gloo")
    size, device = dist.get_world_size(), torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    result: dict[str, Any] = {"kind": "shared card", "shape": args.shape, "tokens": args.tokens, "processes": size}
    result |= {"machine": machine() if device.type == "cuda" else {**machine(), "device": "CPU"}}
    result |= {"command": f"torchrun --nproc-per-node {size} -m headscope.interp.benchmarks.shared_card {words}"}
    model = random_model(SHAPES[args.shape], max(args.tokens, 2048), str(device))
    for dtype in (torch.bfloat16, torch.float32):  # made in the first; frequencies stay float32 so
        result[str(dtype).removeprefix("torch.")] = compare(model.to(dtype), SHAPES[args.shape], args.tokens)
    result["beyond"] = beyond(result)
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=1), flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            name = result["machine"]["device"].lower().replace(" ", "-")
            path = args.out / f"{name}-shared-card-{args.shape}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
    if not started:
        dist.destroy_process_group()
    return result


@torch.no_grad()
def compare(model: LlamaForCausalLM, shape: Shape, tokens: int) -> dict[str, Any]:
    """The largest difference of every statistic as a share of its tolerance, both ways, and the tolerances."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, shape.vocabulary, (1, tokens), generator=draw).to(model.device)
    options: dict[str, Any] = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    chosen = [*rows(tokens), TopKeys(4), KeyMass()]
    with trace(model, chosen) as alone:
        model(**options)
    with context_parallel(model):
        with trace(model, chosen) as both:
            model(**options)
        again = Again(chosen)
        with attached(model, again):
            model(**options)
    apart = tolerance(shape, model.dtype)
    one, other = _values(alone.record), _values(both.record)
    return {
        "same calls": again.worst,
        "two passes": {name: share(one[name], other[name], apart) for name in one if name != PLACES},
        "tolerance": {"same calls": SUMS, "two passes": apart},
        "heaviest keys that differ": float((one[PLACES] != other[PLACES]).double().mean()),
    }


class Again(Handler):
    """Computes the statistics of every call once more as one process does; changes nothing."""

    only_reads = True

    def __init__(self, statistics: list[Statistic]) -> None:
        self.plans = Plans(statistics, None, Exactness(tuple(statistics)).require)
        self.worst: dict[str, float] = {}

    def request(self, call: AttentionCall) -> Request:
        """All that the statistics ask for."""
        return self.plans.of(call, prompt=True, continues=False)[0]

    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        """Compare what the processes found together with what this one finds alone."""
        request, readers, _ = self.plans.of(call, prompt=True, continues=False)
        alone = unsplit(call).attend(request)
        for _, read in readers:
            found = read(reduced)
            for name, value in read(alone).items():
                if name != PLACES:
                    self.worst[name] = max(self.worst.get(name, 0.0), share(value, found[name], SUMS))

    def end_forward(self) -> None:
        """The plans belong to the pass's masks."""
        self.plans.clear()


def share(one: Tensor, other: Tensor, apart: float) -> float:
    """The largest difference of two results over ``apart`` times the largest of them, or times 1 if that is more (of
    tokens and nats, numbers above 1; of mass, 1); infinite where one is no number and the other is."""
    blank = one.isnan()
    if one.shape != other.shape or not torch.equal(blank, other.isnan()):
        return math.inf
    one, other = one[~blank].double(), other[~blank].double()
    if torch.equal(one, other):
        return 0.0
    return float((one - other).abs().max()) / (apart * max(1.0, float(one.abs().max())))


def tolerance(shape: Shape, dtype: torch.dtype) -> float:
    """How far statistics of two right passes may be apart: by how far their scores are, and not below ``SUMS``.

    Each of two additions a layer leaves an element of the residual stream one unit eps in the last place away, and
    projections round once more; independent errors add up in squares: eps sqrt(2 layers + 1) relative. Elements of q
    and k are sums of hidden products with weights of standard deviation 0.02, of variance v = 0.0004 hidden, and
    scale q.k is their sum over d_head dimensions over sqrt(d_head): errors of both have standard deviation
    v eps sqrt(2 (2 layers + 1)) nats. A logsumexp moves by no more than scores do, masses and their sums relatively to
    themselves, distances and entropies relatively to the largest, to first order.
    """
    variance, roundings = 0.02**2 * shape.hidden, 2 * (2 * shape.layers + 1)
    return max(SUMS, WIDEST * variance * math.sqrt(roundings) * torch.finfo(dtype).eps)


def beyond(result: Mapping[str, Any]) -> list[str]:
    """What is not within its tolerance."""
    return [
        f"{dtype}, {how}: {name}"
        for dtype in ("float32", "bfloat16")
        for how in ("same calls", "two passes")
        for name, found in result[dtype][how].items()
        if not found <= 1.0
    ]


def _values(record: xr.Dataset) -> dict[str, Tensor]:
    return {str(name): torch.from_numpy(record[name].to_numpy()) for name in record.data_vars if name != "token"}


if __name__ == "__main__":
    sys.exit(1 if main()["beyond"] else 0)
