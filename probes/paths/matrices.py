"""The matrices of every head, W_Q, W_K, W_V and W_O, read off the modules, whatever their layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites.gradients import frozen
from headscope.probes.paths.norms import FrozenNorm
from headscope.probes.paths.readers import reading
from headscope.probes.paths.writers import LayerPath, find_paths


@dataclass(frozen=True, eq=False)
class HeadMatrices:
    """Of one layer, float64: ``q`` (head, d_head, d_model), ``k`` (kv_head, d_head, d_model), ``v`` (kv_head, d_value,
    d_model), ``o`` (head, d_model, d_value)."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    def each(self, x: Tensor) -> Tensor:
        """What is given by kv_head as (head, ...): query heads of a group share it."""
        return x.repeat_interleave(len(self.q) // len(x), 0)


def head_matrices(lm: LanguageModel, *, fold: bool = True, layers: Sequence[int] | None = None) -> list[HeadMatrices]:
    """Of every layer that attends (or of ``layers``). Scores are x W_Q^T W_K x without the rotation of positions, and
    a head moves W_O W_V x. ``fold``: norms' gains are in them (before attention in q, k and v, after it in o); scales
    are left out.

    Raises:
        HeadscopeError: what stands between the stream and the heads is not linear beside norms, or heads do not reach
            the stream as they are or through a norm.
    """
    with frozen(lm):
        paths = [path for path in find_paths(lm).layers if path.attention is not None]
        found = [_of(lm, path, fold) for path in paths if layers is None or path.layer in layers]
    if not found:
        raise HeadscopeError(f"{lm.name} has no layer whose heads can be read")
    return found


def _of(lm: LanguageModel, path: LayerPath, fold: bool) -> HeadMatrices:
    with reading(lm, path) as readers:
        lm.forward(torch.arange(1, 5)[None] % lm.info.vocab_size)
    q, k, v = (x.double() for x in readers[-1].matrices(fold))
    assert path.attention is not None
    width = path.heads * v.shape[1]
    unit = torch.eye(width, device=q.device, dtype=readers[-1].given.dtype)
    with torch.no_grad():
        zero = path.attention.projection(torch.zeros_like(unit[None, :1]))
        o: Tensor = (path.attention.projection(unit[None]) - zero)[0]  # (head * d_value, d_model)
    if fold and path.attention.norm is not None:
        norm = FrozenNorm.of(path.attention.norm, o[None, :1])
        o = norm.linear(o[None], o.new_ones(1))[0]
    return HeadMatrices(path.layer, q, k, v, o.double().reshape(path.heads, -1, o.shape[-1]).transpose(1, 2))
