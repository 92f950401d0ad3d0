"""Edits of attention scores before softmax, evaluated tile by tile: never a query x key tensor.

1. s = scale q.k, then softcap, then the per-key ``bias``: what the model computes.
2. s' = edit(s, example, head, query position, key position), for the pairs that the mask shows. A hidden key stays
   hidden, and a sink logit is not a score, so neither is edited.
3. The pattern, and with it every statistic, is the softmax of s'.

An edit is declared, as a chain of ``Term`` (``headscope.kernels.edit_terms``), or any Python function. Both mean the
same on every engine. On a GPU a declared one costs a few instructions in Triton's tile: rows, output, columns and
targets. A function's output and lse are compiled by FlexAttention; its other statistics are the streaming engine's, in
PyTorch.

What a cheaper form says exactly needs no edit: a per-key weight is ``bias = log w`` (every engine), and weights changed
after softmax are a ``headscope.kernels.redistribution.Redistribution``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.kernels.edit_terms import Term

# (score, example, head, query position, key position) -> score; the four index tensors broadcast to the score's shape.
ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MOST = 6  # terms that a kernel takes: each chain of other forms is compiled anew


@dataclass(frozen=True, eq=False)
class ScoreEdit:
    """A change of the scores of one attention call, the ``edit`` of ``headscope.kernels.scores.Scores``.

    ``function`` maps (score, example, head, query, key) to the new score, element by element: scores in nats, absolute
    positions as in ``Mask`` (query row ``i`` at ``query_offset + i``), example and head indices of the whole call. Here
    it is given tensors that broadcast to one another, by FlexAttention single elements, so it must be made of pointwise
    operations and of look-ups in tensors that it holds (``slope[head]``). ``-inf`` takes a key's weight away. What it
    returns for a pair that the mask hides does not matter.

    ``pointwise=False`` says that the function needs whole tiles (it may multiply matrices, and knows by the shapes of
    its four index tensors which scores it is given): FlexAttention then leaves the call to the streaming engine.

    ``terms`` say the same as ``function``, for a kernel; ``ScoreEdit.of`` makes both of one declaration.
    """

    function: ScoreFunction
    pointwise: bool = True
    terms: tuple[Term, ...] | None = None

    @classmethod
    def of(cls, *terms: Term) -> ScoreEdit:
        """The declared edit of ``terms``, one after the other."""
        functions = [term.function() for term in terms]

        def changed(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            for function in functions:
                s = function(s, b, h, q, k)
            return s

        return cls(changed, terms=terms)

    def __call__(self, score: Tensor, example: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.function(score, example, head, query, key).to(score.dtype)

    @property
    def in_kernels(self) -> bool:
        """Whether Triton's kernels evaluate it: a declared edit of at most ``MOST`` terms."""
        return self.terms is not None and 0 < len(self.terms) <= MOST

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tables of a declared edit."""
        return tuple([table for term in self.terms or () for table in term.tables.values()])

    def then(self, after: ScoreEdit) -> ScoreEdit:
        """This edit, and ``after`` on what it gives: declared where both are."""
        if self.terms is not None and after.terms is not None:
            return ScoreEdit.of(*self.terms, *after.terms)
        both = self.pointwise and after.pointwise
        return ScoreEdit(lambda s, b, h, q, k: after(self(s, b, h, q, k), b, h, q, k), both)

    def on_heads(self, heads: Sequence[int], of: int, *, device: torch.device | str = "cpu") -> ScoreEdit:
        """This edit for query heads ``heads`` alone, of the ``of`` heads of the call."""
        chosen = torch.zeros(of, dtype=torch.bool, device=device)
        chosen[list(heads)] = True
        if self.terms is not None:
            return ScoreEdit.of(*(term.on_heads(chosen) for term in self.terms))
        return ScoreEdit(lambda s, b, h, q, k: torch.where(chosen[h], self(s, b, h, q, k), s), self.pointwise)

    def of_part(self, examples: slice, heads: slice) -> ScoreEdit:
        """This edit for a call of some ``examples`` and ``heads`` of its own, slices with both ends."""
        if self.terms is not None:
            return ScoreEdit.of(*(term.of_part(examples, heads) for term in self.terms))
        example, head = examples.start, heads.start
        if not (example or head):
            return self
        return ScoreEdit(lambda s, b, h, q, k: self(s, b + example, h + head, q, k), self.pointwise)

    def check(self, batch: int, heads: int, queries: range, keys: range) -> None:
        """Raise ValueError where a declared edit's tables are not those of a call of these positions."""
        places = {"queries": (queries.start, queries.stop), "keys": (keys.start, keys.stop)}
        for term in self.terms or ():
            term.check(batch, heads, places)

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
    return ScoreEdit.of(Term(of="score", keys=factors[None] - 1))


def distance_slope(slopes: Tensor) -> ScoreEdit:
    """Subtract ``slopes[head] * (query - key)`` (nats per token): ALiBi (Press et al. 2021, arXiv 2108.12409, §3)."""
    return ScoreEdit.of(Term(queries=-slopes[None, :, None], slope=True))


def by_distance(scale: Tensor | None = None, bias: Tensor | None = None) -> ScoreEdit:
    """s' = scale[head, distance] s + bias[head, distance], tables (head or 1, distance) on the call's device.

    The distance is query - key in tokens; beyond a table's end its last column holds, and its first for keys ahead of
    the query. A measured positional bias is taken out by subtracting it: what Hsieh et al. 2024 (arXiv 2406.16008) do
    with the weights of whole documents after softmax, here with scores.
    """
    terms = [] if scale is None else [Term(of="score", distances=scale[None] - 1)]
    return ScoreEdit.of(*terms, *([] if bias is None else [Term(distances=bias[None])]))
