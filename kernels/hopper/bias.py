"""A key bias by the matrix unit: with each tile of keys comes one of its bias, which a second product adds to them.

That product is 16 columns wide, the fewest that the unit takes: what an eighth of a head 128 wide costs, while the loop
neither loads nor adds anything. One operand is all ones. The other, 32 bytes a key and head, is the bias over the scale
in three pieces of bfloat16 (8 bits each, together float32's 24), and zeros: products with 1 are exact. The unit adds
the pieces to the sum of q.k in float32 and may cut off bits below the last of the largest of them: an error of two such
bits, 2^-22 of q.k or of the bias, as a rounding of either is. Float16 has not the range, a softcap comes before a bias,
and with features or heads wider than 128 there is no room in shared memory: ``scores.key_bias`` is then added, as it
is to the scores of few keys.
"""

# A kernel's types are its arguments' at compile time.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from headscope.kernels.hopper.device import GROUP_ROWS, LOG2E, buffers, fetch, tile_width, tiles

COLUMNS = gl.constexpr(16)
LEAST = 4096  # keys: of fewer, to put the pieces together takes as long as they save


def pieces(score: Any) -> Tensor:
    """The bias (batch or 1, head or 1, key) of ``score`` as (..., key, 16) bfloat16, which sum up to it over the unit.

    -inf, which hides a key, is a finite number here (``triton.device.score``) and stays one.
    """
    rest = score.bias / (score.scale * LOG2E.value)
    found = torch.zeros(*rest.shape, COLUMNS.value, dtype=torch.bfloat16, device=rest.device)
    for n in range(3):
        found[..., n] = rest
        rest = rest - found[..., n].float()
    return found


def bias_tiles(q: Tensor, score: Any, columns: Tensor | None, keys: int) -> tuple[Any, Any]:
    """Tiles of ``keys`` of the bias and a ``score`` that has none, or None and the ``score`` as it is (see above)."""
    fits = q.dtype == torch.bfloat16 and columns is None and tile_width(q.shape[3]) <= 128
    if score.bias is None or score.softcap is not None or not fits or score.bias.shape[-1] < LEAST:
        return None, score
    return tiles(pieces(score), keys), score._replace(bias=None)


@gluon.jit
def bias_room(bias_at, STAGES: gl.constexpr):
    """Shared memory for ``STAGES`` tiles, and the ones (row, column) that they are multiplied with."""
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    one = gl.full([GROUP_ROWS, COLUMNS], 1.0, bias_at.dtype, narrow)
    return buffers(bias_at, STAGES), gl.allocate_shared_memory(bias_at.dtype, [GROUP_ROWS, COLUMNS], layout, one)


@gluon.jit
def fetch_bias(bias_at, b, h, start, score, ready, tile):
    """Let the bias of the keys from ``start`` come by ``ready``."""
    example, head = gl.minimum(score.bias_batch, 1) * b, gl.minimum(score.bias_head, 1) * h
    fetch(bias_at, [example.to(gl.int32), head.to(gl.int32), start, 0], ready, tile)


@gluon.jit
def products(q, k_smem, stage, bias):
    """Issue the product S (row, key) of queries and a tile of keys and, last, that of its ``bias``: ``bias_room``.

    Without one, the keys' own tiles stand in its place.
    """
    BN: gl.constexpr = k_smem.shape[3]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    kt = k_smem.index(stage).reshape([BN, k_smem.shape[4]]).permute([1, 0])
    s = warpgroup_mma(q, kt, gl.zeros([GROUP_ROWS, BN], gl.float32, mma), use_acc=False, is_async=True)
    if bias[0].shape[4] == COLUMNS:
        added = bias[0].index(stage).reshape([BN, COLUMNS]).permute([1, 0])
        s = warpgroup_mma(bias[1], added, s, is_async=True)
    return s
