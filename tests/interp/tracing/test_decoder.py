"""Where the decoder stands, and padding that a dense mask does not tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.tracing.decoder import DecoderPosition
from headscope.kernels.masks import Mask


def call(*, dense: bool, mask: Mask | None = None) -> Any:
    return SimpleNamespace(dense=dense, mask=mask or Mask())


@pytest.mark.parametrize("padded", [False, True])
def test_padding_under_a_dense_mask_is_refused_in_every_pass(padded: bool) -> None:
    at = DecoderPosition()
    padding = torch.tensor([[0 if padded else 1, 1, 1]])
    for _ in range(2):
        at.begin({"attention_mask": padding})
        at.see(call(dense=False))
        at.see(call(dense=True, mask=Mask(start=torch.tensor([1]))))  # this one says where the example begins
        if padded:
            with pytest.raises(HeadscopeError, match="prompts of one length"):
                at.see(call(dense=True))
        else:
            at.see(call(dense=True))
