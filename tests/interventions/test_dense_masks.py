"""Edits by position and phase under ready-made 4-D masks: what counts from the first token is found there, or refused.

Tolerance: 1e-4 of logits of order 10, as for the same masks in test_mask_structure.py: SDPA adds in another order.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts import prompt_boundary
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import AblateHeads, apply

HEADS = [(0, 1), (1, 0), (1, 3)]
SIZE, PAD = 12, 5
AT = {"positions": (2, 4)}
SETTINGS: list[tuple[dict[str, Any], int | None]] = [
    (AT, None),
    ({"during": "answer"}, 4),
    ({"during": "decode"}, 4),
    ({"during": "prefill", "positions": (1, 6)}, 4),
]


def ids() -> Tensor:
    return torch.randint(5, 90, (1, SIZE), generator=torch.Generator().manual_seed(0))


def logits(model: Any, edit: AblateHeads | None, boundary: int | None, **inputs: Any) -> Tensor:
    ends = nullcontext() if boundary is None else prompt_boundary(boundary)
    with torch.no_grad(), nullcontext() if edit is None else apply(model, edit), ends:
        found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(("settings", "boundary"), SETTINGS)
def test_left_padding_in_a_dense_mask_moves_no_edit(
    settings: dict[str, Any], boundary: int | None, additive: bool
) -> None:
    model, edit = tiny_model("llama"), AblateHeads(HEADS, **settings)
    text = ids()[:, PAD:]
    wanted = logits(model, edit, boundary, input_ids=text)
    assert (wanted - logits(model, None, None, input_ids=text)).abs().max() > 1e-2
    seen = torch.ones(SIZE, SIZE).tril().bool() & (torch.arange(SIZE) >= PAD)
    mask: Tensor = seen[None, None]
    mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    at = (torch.arange(SIZE) - PAD).clamp(min=0)[None]
    found = logits(model, edit, boundary, input_ids=ids(), attention_mask=mask, position_ids=at)
    torch.testing.assert_close(found[:, PAD:], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("settings", "boundary"), SETTINGS)
def test_where_positions_cannot_be_told_the_edit_is_refused(settings: dict[str, Any], boundary: int | None) -> None:
    model, edit = tiny_model("llama"), AblateHeads(HEADS, **settings)
    between = torch.ones(1, 1, SIZE, SIZE).tril().bool()
    between[..., 4:6] = False
    with pytest.raises(HeadscopeError, match="count from an example's first token"):
        logits(model, edit, boundary, input_ids=ids(), attention_mask=between)
    with torch.no_grad():
        held = {"past_key_values": model(input_ids=ids()).past_key_values, "input_ids": ids()[:, :1]}
    for hidden in (slice(0, 3), slice(5, 8)):
        mask = torch.ones(1, 1, 1, SIZE + 1).bool()
        mask[..., hidden] = False
        with pytest.raises(HeadscopeError, match="count from an example's first token"):
            logits(model, edit, boundary, attention_mask=mask, **held)


def test_an_edit_of_every_row_needs_no_positions() -> None:
    model, edit = tiny_model("llama"), AblateHeads(HEADS)
    between = torch.ones(1, 1, SIZE, SIZE).tril().bool()
    between[..., 4:6] = False
    found = logits(model, edit, None, input_ids=ids(), attention_mask=between)
    assert (found - logits(model, None, None, input_ids=ids(), attention_mask=between)).abs().max() > 1e-2


@pytest.mark.parametrize("dense", [False, True])
def test_packed_sequences_have_positions_and_no_boundary(dense: bool) -> None:
    """A position is one of the example, as for span statistics: the second sequence begins at 7."""
    model = tiny_model("llama")
    at = torch.cat([torch.arange(7), torch.arange(5)])[None]
    inputs: dict[str, Any] = {"input_ids": ids(), "position_ids": at, "use_cache": False}
    if dense:
        segment = torch.tensor([0] * 7 + [1] * 5)
        inputs["attention_mask"] = (torch.ones(SIZE, SIZE).tril().bool() & (segment[:, None] == segment))[None, None]
    found = logits(model, AblateHeads(HEADS, positions=(8, 10)), None, **inputs)
    second = logits(model, AblateHeads(HEADS, positions=(1, 3)), None, input_ids=ids()[:, 7:])
    torch.testing.assert_close(found[:, 7:], second, atol=1e-4, rtol=0)
    with pytest.raises(HeadscopeError, match="holds several sequences"):
        logits(model, AblateHeads(HEADS, during="answer"), 4, **inputs)
