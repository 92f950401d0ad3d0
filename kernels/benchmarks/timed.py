"""What the benchmarks time, by name, and on which tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from headscope.kernels import attention
from headscope.kernels import gpu_passes as passes
from headscope.kernels.blocks import blocks, top_blocks
from headscope.kernels.divergence import divergence
from headscope.kernels.masks import Mask
from headscope.kernels.request import Columns, Request
from headscope.kernels.score_edits import distance_slope
from headscope.kernels.scores import Scores
from headscope.kernels.spans import span_outputs
from headscope.kernels.triton.topk import top_keys

HEADS, KV_HEADS = 32, 8
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(queries: int, keys: int, d: int, heads: int = HEADS, kv: int = KV_HEADS) -> Tensors:
    """Random bf16 q, k, v and 16 indicators of random keys."""
    gen = torch.Generator("cuda").manual_seed(0)
    shapes = ((1, heads, queries, d), (1, kv, keys, d), (1, kv, keys, d))
    q, k, v = (torch.randn(s, generator=gen, device="cuda", dtype=torch.bfloat16) for s in shapes)
    flags = (torch.rand(keys, 16, generator=gen, device="cuda") < 0.1).to(torch.bfloat16)
    return q, k, v, flags


def kinds(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, flags: torch.Tensor, mask: Mask | None = None
) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; ``sdpa`` is the yardstick. ``mask`` is causal by default."""
    keys, queries = k.shape[2], q.shape[2]
    mask, scale = mask or Mask.causal(keys - queries), q.shape[-1] ** -0.5
    call: dict[str, Any] = {"mask": mask, "scale": scale}
    scores = Scores(q, k, **call)
    spans = torch.arange(keys, device=q.device)[:, None] * 16 // keys == torch.arange(16, device=q.device)

    def rows(wants: set[str], values: Any = None, features: torch.Tensor | None = None) -> Callable[[], Any]:
        wants |= set() if features is None else {"linear"}
        return lambda: passes.rows(q, k, values, features=features, wants=frozenset(wants), **call)

    every: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True),
        "rows: lse": rows({"lse"}),  # the least a statistic costs
        "rows: lse, entropy": rows({"lse", "entropy"}),
        "rows": rows({"lse", "entropy"}, None, flags),
        "rows: 16 spans": rows({"lse", "entropy"}, None, spans),
        "output": rows({"output"}, v),
        "output, lse, entropy": rows({"lse", "entropy", "output"}, v),
        "fused": rows({"lse", "entropy", "output"}, v, flags),
        "fused: 16 spans": rows({"lse", "entropy", "output"}, v, spans),
    }
    lse = passes.rows(q, k, None, **call).lse
    assert lse is not None
    every |= {f"top {n} keys": partial(top_keys, q, k, lse, count=n, **call) for n in (1, 8, 32)}
    if queries == keys:
        every["columns: sum"] = lambda: passes.columns(q, k, lse, **call)
        every["columns: sum, max"] = lambda: passes.columns(q, k, lse, highest=True, **call)
        every["blocks of 128"] = lambda: blocks(scores, size=128, lse=lse)
        every["top 16 blocks of 128"] = lambda: top_blocks(scores, size=128, top=16)
        every["divergence"] = lambda: divergence(scores, replace(scores, k=v))
        quarters = [(n * keys // 4, (n + 1) * keys // 4) for n in range(4)]
        every["4 spans"] = lambda: span_outputs(scores, v, quarters)
        edit = distance_slope(torch.full((HEADS,), 1e-3, device="cuda"))
        every["edited output"] = lambda: attention.output(replace(scores, edit=edit), v)
        if find_spec("flash_colreduce"):
            flash_colreduce = import_module("flash_colreduce").flash_colreduce
            wide = k.repeat_interleave(HEADS // KV_HEADS, dim=1)  # it takes one key head a query head
            every["flash-colreduce"] = lambda: flash_colreduce(q, wide, "sum", is_causal=True, scale=scale)
        request = Request(output=False, columns=(Columns(sum=True),))
        every["columns incl. lse"] = lambda: attention.attend(scores, v, request=request)
    return every
