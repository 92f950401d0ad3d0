"""Where heads look in the picture: patterns, profiles over rings of patches, and maps small enough to encode."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from headscope.interp.analysis.pattern_embedding import SIDE
from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.laboratory.vision_transformer.model import VisionTransformer
from headscope.interp.results.scores import HeadScores
from headscope.interp.sites import attached
from headscope.kernels.request import Reduced, Request


class _Patterns(Handler):
    """Keeps every layer's pattern: a picture is a few dozen tokens."""

    only_reads = True

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def request(self, call: AttentionCall) -> Request | None:
        return Request()

    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        self.found[call.layer] = call.pattern().cpu()


def patterns(model: VisionTransformer, pictures: Tensor) -> Tensor:
    """Every head's pattern (picture, layer, head, query, key), token 0 being CLS."""
    handler = _Patterns()
    with attached(model, handler):
        model(pictures)
    return torch.stack([handler.found[layer] for layer in range(len(model.layers))], 1)


def hops(grid: int) -> Tensor:
    """Chebyshev distance (the larger of the steps along rows and columns) of every two patches: (patch, patch)."""
    at = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))
    return (at[:, None] - at[None]).abs().amax(-1)


def profile(found: Tensor, grid: int) -> xr.Dataset:
    """How a head's attention spreads in the picture, means over pictures and patches (after arXiv 2303.13731).

    The paper profiles attention between patches that are k steps apart; its formulas are not public. [OURS], with a
    patch's ring k being the patches at Chebyshev distance k that lie in the picture (rings are cut at the border):

    * ``ring`` (layer, head, hop): the mass that a patch's row puts on its ring; 0 is the patch itself;
    * ``neighbour`` (layer, head, hop): that mass a patch of the ring, mean over the patches that have such a ring;
    * ``cls`` (layer, head): a patch's mass on CLS, so that cls + sum_k ring = 1.

    The row of CLS is left out. Pictures are small: most rings are cut, so compare ``ring`` with that of uniform
    attention (``profile`` of a constant pattern), not with 1.

    Args:
        found: patterns (picture, layer, head, query, key).
        grid: patches a side.
    """
    apart, rows = hops(grid), found[..., 1:, :].double()
    inside = torch.nn.functional.one_hot(apart, grid).double()  # (patch, patch, hop)
    mass = torch.einsum("...qk,qkh->...qh", rows[..., 1:], inside)
    count = inside.sum(1)  # (patch, hop)
    there = count > 0
    each = torch.where(there, mass / count.clamp(min=1), 0).sum(-2) / there.sum(0)
    held = {"ring": mass.mean((0, -2)), "neighbour": each.mean(0)}
    variables = {name: (("layer", "head", "hop"), value.numpy()) for name, value in held.items()}
    cls = rows[..., 0].mean((0, -1)).numpy()
    return xr.Dataset({**variables, "cls": (("layer", "head"), cls)}, {"hop": np.arange(grid)})


def mean_hops(found: Tensor, grid: int) -> HeadScores:
    """Mean distance in patches that a head looks, sum_k k ring_k / sum_k ring_k, a trial a picture."""
    rows = found[..., 1:, 1:].double()
    apart = (rows * hops(grid)).sum(-1).mean(-1) / rows.sum(-1).mean(-1)
    return HeadScores("mean_hops", apart.numpy())


def maps(found: Tensor) -> xr.DataArray:
    """Patterns among patches as ``embed_patterns`` takes them, (example, layer, head, query_block, key_block): patches
    in the order of reading, pooled to at most 14 a side by means over (overlapping, where 14 is no divisor) bins."""
    among = found[..., 1:, 1:].float()
    side = min(SIDE, among.shape[-1])
    small = adaptive_avg_pool2d(among.flatten(0, 2)[:, None], side)[:, 0]  # merges picture, layer and head
    dims = ("example", "layer", "head", "query_block", "key_block")
    values = small.reshape(*among.shape[:3], side, side).numpy()
    return xr.DataArray(values, {"layer": np.arange(among.shape[1])}, dims)
