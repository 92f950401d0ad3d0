"""AttentionCall: what one attention layer computes with. Sites produce it, statistics read it, edits change it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.kernels import attention as kernels
from headscope.kernels import redistribute as redistributed
from headscope.kernels.masks import Mask
from headscope.kernels.redistribution import Move, Redistribution
from headscope.kernels.request import Reduced, Request
from headscope.kernels.score_edits import ScoreEdit
from headscope.kernels.scores import Scores

LOWEST = -1e30  # stands for -inf where a bias says "never": finite, so that 0 times it is 0

__all__ = ["AttentionCall", "Mask"]


@dataclass(eq=False)  # made in every call of every layer: a frozen one takes three times as long to make
class AttentionCall:
    """One attention layer at one forward pass. Nothing changes one after it was made.

    ``query`` (batch, head, query, d_head), ``key`` and ``value`` (batch, kv_head, key, ·): after position embedding and
    QK-norm, after the cache update, key/value heads not repeated. ``layer`` is the layer's index within its tower,
    ``module`` the tower's modules as a pattern such as ``"model.layers.*.self_attn"``. ``position_bias`` (batch or 1,
    head or 1, query, key) is added to the scores (T5). ``cross``: queries and keys are of different sequences, so that
    distances between them mean nothing. ``gaps``: padding stands between tokens, not only around them. ``dense``: the
    mask came as a tensor, which may hold padding without saying so.

    No model computes with the last four, which are for edits (``with_key_bias`` and so on); statistics are those of
    the edited pattern. ``key_bias`` (batch or 1, head or 1, key) is added to each key's score after softcap;
    ``score_edit`` changes the scores last; ``redistribution`` moves mass between keys after softmax; ``moved``: an
    edit changed the positions that queries and keys hold, so that nobody can tell them from the mask any more.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    scale: float
    layer: int
    module: str
    softcap: float | None = None
    sinks: Tensor | None = None
    position_bias: Tensor | None = None
    cross: bool = False
    gaps: bool = False
    dense: bool = False
    key_bias: Tensor | None = None
    score_edit: ScoreEdit | None = None
    redistribution: Move | None = None
    moved: bool = False

    def attend(self, request: Request) -> Reduced:
        """Compute ``request``, sharing one pass."""
        scores = self.inputs()
        v = self.value if self.position_bias is None else self.value.to(scores.dtype)
        if self.redistribution is None:
            reduced = kernels.attend(scores, v, request=request)
        else:
            reduced = redistributed.redistribute(scores, v, self.redistribution, request=request)
        if reduced.output is not None and reduced.output.dtype != self.value.dtype:
            reduced.output = reduced.output.to(self.value.dtype)
        return reduced

    def output(self) -> Tensor:
        """The heads' outputs z (batch, head, query, d_value)."""
        if self.redistribution is not None:
            z = self.attend(Request()).output
            assert z is not None
            return z
        scores = self.inputs()
        v = self.value if self.position_bias is None else self.value.to(scores.dtype)
        z = kernels.output(scores, v)
        return z if z.dtype == self.value.dtype else z.to(self.value.dtype)

    def pattern(self, rows: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """One exact tile of the pattern (batch, head, row, key), float32."""
        if self.redistribution is not None:
            return redistributed.pattern(self.inputs(), self.redistribution, rows=rows, keys=keys)
        return kernels.pattern(self.inputs(), rows=rows, keys=keys)

    def inputs(self) -> Scores:
        """What the kernels take. A position bias becomes ``key`` further dimensions: q.k + b = [q, b].[k, e]."""
        q, k, scale = self.query, self.key, self.scale
        if self.score_edit is not None and torch.is_grad_enabled() and not q.requires_grad:
            q = q.detach().requires_grad_()  # what the edit holds may require a gradient, which no kernel can see
        if self.position_bias is not None:
            if self.softcap is not None:
                raise HeadscopeError("attention with both a softcap and a position bias is not supported")
            batch, kv_heads, keys, _ = k.shape
            wide = torch.promote_types(q.dtype, torch.float32)
            bias = self.position_bias.to(wide).clamp(min=LOWEST).expand(batch, q.shape[1], q.shape[2], keys)
            unit = torch.eye(keys, dtype=wide, device=k.device).expand(batch, kv_heads, -1, -1)
            q, k, scale = torch.cat([q.to(wide) * scale, bias], -1), torch.cat([k.to(wide), unit], -1), 1.0
        return Scores(q, k, self.mask, scale, self.softcap, self.sinks, self.key_bias, self.score_edit)

    def either(self, held: Tensor, one: Tensor | float, other: Tensor | float) -> Tensor:
        """``one`` where ``held`` is True and ``other`` elsewhere, in float32 or the layer's wider precision."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        this, that = (torch.as_tensor(x, dtype=dtype, device=held.device) for x in (one, other))
        return torch.where(held, this, that)

    def with_(self, **changes: Any) -> AttentionCall:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def with_key_bias(self, bias: Tensor) -> AttentionCall:
        """A copy in which ``bias`` (batch or 1, head or 1, key) is added to each key's score, and to an earlier bias.

        ``log c`` multiplies the key's weight by c before renormalisation; -inf takes the key away.
        """
        return replace(self, key_bias=bias if self.key_bias is None else self.key_bias + bias)

    def with_score_edit(self, edit: ScoreEdit) -> AttentionCall:
        """A copy whose scores ``edit`` (see ``headscope.kernels.score_edits``) changes last, after an earlier edit.

        Tables that it holds must be on the layer's device.
        """
        return replace(self, score_edit=edit if self.score_edit is None else self.score_edit.then(edit))

    def with_redistribution(self, move: Redistribution) -> AttentionCall:
        """A copy in which ``move`` moves mass between keys after softmax, after an earlier move.

        Scores come first: an edit of them acts before every move, whichever was given first.
        """
        return replace(self, redistribution=move if self.redistribution is None else self.redistribution.then(move))
