"""What the scores of one attention call are made of: one value that every reduction takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headscope.kernels.masks import Mask
from headscope.kernels.score_edits import ScoreEdit


@dataclass(eq=False)  # made in every call of every layer: a frozen one takes three times as long to make
class Scores:
    """Scores (batch, head, query, key) that are never built. Nothing changes one after it was made.

    1. s = ``scale`` q.k of the queries ``q`` (batch, head, query, d_head) and keys ``k`` (batch, kv_head, key, d_head),
       after position embedding and any normalisation; query head ``h`` reads ``kv_head = h // (head / kv_head)``.
    2. ``softcap * tanh(s / softcap)`` (Gemma 2).
    3. ``bias`` (batch or 1, head or 1, key) is added. ``log c`` multiplies the key's weight by ``c`` before
       renormalisation, and -inf takes the key away.
    4. ``edit`` changes what then stands there, of the pairs that ``mask`` shows.

    ``sinks`` (head,) is one extra logit a head in the softmax denominator (gpt-oss).
    """

    q: Tensor
    k: Tensor
    mask: Mask
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    edit: ScoreEdit | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        batch, heads, queries, _ = self.q.shape
        return batch, heads, queries, self.k.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """What statistics are computed in: at least float32."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def is_plain(self) -> bool:
        """Whether nothing but a mask and a scale stands between q.k and softmax."""
        return self.softcap is None and self.sinks is None and self.bias is None and self.edit is None

    @property
    def device_arguments(self) -> dict[str, Any]:
        """What a device kernel takes beside q, k and sink logits; an edit only where there is one, so that a kernel
        that evaluates none refuses it."""
        given = {"mask": self.mask, "scale": self.scale, "softcap": self.softcap, "bias": self.bias}
        return given if self.edit is None else given | {"edit": self.edit}

    @property
    def in_kernels(self) -> bool:
        """Whether the kernels of rows, columns and targets evaluate the edit, if there is one."""
        return self.edit is None or self.edit.in_kernels

    def rows(self, part: slice) -> Scores:
        """Those of the query rows ``part``, a slice with both ends."""
        mask = replace(self.mask, query_offset=self.mask.query_offset + part.start)
        return replace(self, q=self.q[:, :, part], mask=mask)

    def keys(self, part: slice) -> Scores:
        """Those of the keys ``part``, a slice with both ends."""
        mask = replace(self.mask, key_offset=self.mask.key_offset + part.start)
        bias = None if self.bias is None else self.bias[..., part]
        return replace(self, k=self.k[:, :, part], mask=mask, bias=bias)

    def check(self, v: Tensor | None = None) -> None:
        """Raise ValueError where these inputs, and values ``v``, do not belong together."""
        q, k, sinks, bias = self.q.shape, self.k.shape, self.sinks, self.bias  # asked once: of every layer's call
        shapes = (q, k, k if v is None else v.shape)
        if not len(q) == len(k) == len(shapes[2]) == 4:
            raise ValueError(f"q, k and v must be (batch, head, position, d); got {[tuple(x) for x in shapes]}")
        (batch, heads, _, width), (k_batch, kv_heads, keys, k_width) = q, k
        if batch != k_batch or width != k_width or shapes[2][:3] != k[:3]:
            raise ValueError(f"q, k and v do not belong together: {[tuple(x) for x in shapes]}")
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
        if sinks is not None and sinks.shape != (heads,):
            raise ValueError(f"sinks must have one logit a head, shape ({heads},); got {tuple(sinks.shape)}")
        sizes = ((1, batch), (1, heads), (keys,))
        if bias is not None and (
            bias.dim() != 3 or any(n not in fit for n, fit in zip(bias.shape, sizes, strict=True))
        ):
            raise ValueError(f"bias must be ({batch} or 1, {heads} or 1, {keys}); got {tuple(bias.shape)}")
        if self.q.is_neg() or self.k.is_neg() or (v is not None and v.is_neg()):  # a kernel reads what is in memory
            raise ValueError("q, k or v is a lazy negation (torch's is_neg): give x.resolve_neg()")
        if self.edit is not None:
            row, key = self.mask.query_offset, self.mask.key_offset
            self.edit.check(batch, heads, range(row, row + q[2]), range(key, key + keys))
