"""Edits of attention scores before softmax, as a function that is evaluated tile by tile: never a query x key tensor.

1. s = scale q.k, then softcap, then the per-key ``bias``: what the model computes.
2. s' = edit(s, example, head, query position, key position), for the pairs that the mask shows. A hidden key stays
   hidden, and a sink logit is not a score, so neither is edited.
3. The pattern, and with it every statistic, is the softmax of s'.

What a cheaper form says exactly needs no edit: a per-key weight is ``bias = log w`` (every engine), and weights changed
after softmax are a ``headscope.kernels.redistribution.Redistribution``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# (score, example, head, query position, key position) -> score; the four index tensors broadcast to the score's shape.
ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ScoreEdit:
    """A change of the scores of one attention call, the ``edit`` of ``headscope.kernels.attention.attend``.

    ``function`` maps (score, example, head, query, key) to the new score, element by element: scores in nats, absolute
    positions as in ``Mask`` (query row ``i`` at ``query_offset + i``), example and head indices of the whole call. Here
    it is given tensors that broadcast to one another, by FlexAttention single elements, so it must be made of pointwise
    operations and of look-ups in tensors that it holds (``slope[head]``). ``-inf`` takes a key's weight away. What it
    returns for a pair that the mask hides does not matter.

    ``pointwise=False`` says that the function needs whole tiles (it may multiply matrices, and knows by the shapes of
    its four index tensors which scores it is given): FlexAttention then leaves the call to the streaming engine.
    """

    function: ScoreFunction
    pointwise: bool = True

    def __call__(self, score: Tensor, example: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.function(score, example, head, query, key).to(score.dtype)

    def then(self, after: ScoreEdit) -> ScoreEdit:
        """This edit, and ``after`` on what it gives."""
        both = self.pointwise and after.pointwise
        return ScoreEdit(lambda s, b, h, q, k: after(self(s, b, h, q, k), b, h, q, k), both)

    def on_heads(self, heads: Sequence[int], of: int, *, device: torch.device | str = "cpu") -> ScoreEdit:
        """This edit for query heads ``heads`` alone, of the ``of`` heads of the call."""
        chosen = torch.zeros(of, dtype=torch.bool, device=device)
        chosen[list(heads)] = True
        return ScoreEdit(lambda s, b, h, q, k: torch.where(chosen[h], self(s, b, h, q, k), s), self.pointwise)

    def tile(self, scores: Tensor, examples: Tensor, heads: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """The edited ``scores`` (example, head, query, key) of the given indices and absolute positions, each 1-D.

        Raises ValueError where the function returns another shape.
        """
        b, h = examples[:, None, None, None], heads[None, :, None, None]
        edited = self(scores, b, h, queries[None, None, :, None], keys[None, None, None, :])
        if edited.shape != scores.shape:
            raise ValueError(f"a score edit was given {tuple(scores.shape)} and returned {tuple(edited.shape)}")
        return edited


def key_scale(factors: Tensor) -> ScoreEdit:
    """Multiply the scores of each key by ``factors`` (head or 1, key position): 0 makes a key neutral, not hidden."""

    def scaled(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s * (factors[0, k] if factors.shape[0] == 1 else factors[h, k])

    return ScoreEdit(scaled)


def distance_slope(slopes: Tensor) -> ScoreEdit:
    """Subtract ``slopes[head] * (query - key)`` (nats per token): ALiBi (Press et al. 2021, arXiv 2108.12409, §3)."""
    return ScoreEdit(lambda s, b, h, q, k: s - slopes[h] * (q - k))


def by_distance(scale: Tensor | None = None, bias: Tensor | None = None) -> ScoreEdit:
    """s' = scale[head, distance] s + bias[head, distance], tables (head or 1, distance) on the call's device.

    The distance is query - key in tokens; beyond a table's end its last column holds, and its first for keys ahead of
    the query. A measured positional bias is taken out by subtracting it: what Hsieh et al. 2024 (arXiv 2406.16008) do
    with the weights of whole documents after softmax, here with scores.
    """

    def read(table: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = torch.clamp(q - k, 0, table.shape[1] - 1)
        return table[0, at] if table.shape[0] == 1 else table[h, at]

    def changed(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        s = s if scale is None else s * read(scale, h, q, k)
        return s if bias is None else s + read(bias, h, q, k)

    return ScoreEdit(changed)
