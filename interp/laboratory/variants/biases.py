"""Learned keys and values beside those of the tokens, in place of a sink."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from headscope.interp.laboratory.decoder import Shape
from headscope.interp.laboratory.variants.base import Variant

_SOURCE = "Gu et al. 2024, arXiv 2410.10781, section 7 (sail-sg/Attention-Sink, model_kv_bias.py)"


class KeyBias(Variant):
    """A learned key a head before the text, whose value is 0: a query may read nothing.

    It has no rotation and stands at position -1, so that statistics of positions are those of tokens, and their masses
    sum to less than 1 by what it takes. (The authors' metric counts it as position 0 of T + 1.) It begins at 0. Under
    ALiBi it stands one token before the first.
    """

    name: ClassVar[str] = "key_bias"
    source: ClassVar[str] = _SOURCE
    valued: ClassVar[bool] = False

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        self.extra_key = nn.Parameter(torch.zeros(shape.heads, 1, self.d_head))
        self.extra_value = nn.Parameter(torch.zeros(shape.heads, 1, self.d_value)) if self.valued else None
        self.one_before = replace(shape.mask, key_offset=-1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        value = torch.zeros_like(v[0, :, :1]) if self.extra_value is None else self.extra_value
        k, v = (
            torch.cat([one.expand(x.shape[0], -1, -1, -1), many], 2) for one, many in ((self.extra_key, k), (value, v))
        )
        return self.see(q, k, v, mask=self.one_before)


class KeyValueBias(KeyBias):
    """``KeyBias`` whose value is learned too."""

    name: ClassVar[str] = "key_value_bias"
    valued: ClassVar[bool] = True


class ValueBias(Variant):
    """A learned vector a head, added to what it reads: nothing that a query could look at."""

    name: ClassVar[str] = "value_bias"
    source: ClassVar[str] = _SOURCE

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        self.extra_value = nn.Parameter(torch.zeros(shape.heads, 1, self.d_value))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.see(q, k, v) + self.extra_value
