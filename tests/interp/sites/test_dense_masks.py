"""Masks that come as tensors become rules that say the same."""

from __future__ import annotations

import pytest
import torch

from headscope.interp.sites.huggingface import dense_masks
from headscope.kernels.masks import Mask


@pytest.mark.parametrize("window", [None, 3])
def test_dense_masks_become_rules(window: int | None) -> None:
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, :2] = False
    padding[1, 7:] = False
    at = torch.arange(9)
    visible = (at[:, None] >= at) & (at[:, None] - at < (window or 99)) & padding[:, None, None]
    rule = dense_masks.rule_of(visible, real=padding)
    assert rule.rule is None and rule.right == 0
    assert rule.left == (None if window is None else window - 1)
    assert dense_masks.agrees(rule, visible)
    assert not dense_masks.agrees(Mask.causal(), visible)
    decoding = dense_masks.rule_of(visible[:, :, 6:7], query_offset=6, real=padding)
    assert dense_masks.agrees(decoding, visible[:, :, 6:7])
    holes = visible.clone()
    holes[:, :, 5, 4] = False
    looked_up = dense_masks.rule_of(holes, real=padding)
    assert looked_up.rule is not None and dense_masks.agrees(looked_up, holes)
