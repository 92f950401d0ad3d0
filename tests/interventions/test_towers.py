"""``apply(tower=...)``: heads of one tower, against the same edit made by hand on that tower's output projection.

Tolerance: float32 attention by another algorithm than the reference, through two layers of each tower: a few roundings
of 1.2e-7 of the largest logit. A wrong head or tower moves logits by more than 1e-3 of it, asserted below.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from headscope.interp import trace
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.inputs import example_inputs
from headscope.interp.statistics import Entropy
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import AblateHeads, apply

PICKED = [(0, 1), (1, 0)]
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def llava() -> tuple[Any, dict[str, Tensor]]:
    model = tiny_model("llava", "image-text")
    return model, example_inputs(model)


def t5() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = tf.T5ForConditionalGeneration(tf.T5Config(**T5, decoder_start_token_id=0)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    ids = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "decoder_input_ids": ids[:, :6]}


# site -> (model, its output projections by layer)
SITES = {
    "language": (llava, r"language_model\.layers\.(\d)\.self_attn\.o_proj"),
    "vision": (llava, r"vision_tower\..*layers\.(\d)\.self_attn\.out_proj"),
    "encoder": (t5, r"encoder\.block\.(\d)\.layer\.0\.SelfAttention\.o"),
    "decoder": (t5, r"decoder\.block\.(\d)\.layer\.0\.SelfAttention\.o"),
    "cross": (t5, r"decoder\.block\.(\d)\.layer\.1\.EncDecAttention\.o"),
}


@contextmanager
def zeroed_by_hand(model: Any, projections: str) -> Iterator[None]:
    """Zero the inputs of the output projections where the heads of ``PICKED`` stand."""
    hooks = []
    for name, module in model.named_modules():
        found = re.search(projections + "$", name)
        if not found:
            continue
        heads = [head for layer, head in PICKED if layer == int(found[1])]

        def zero(module: Any, args: tuple[Tensor, ...], heads: list[int] = heads) -> tuple[Tensor]:
            z = args[0].clone().unflatten(-1, (4, -1))
            z[..., heads, :] = 0
            return (z.flatten(-2),)

        hooks.append(module.register_forward_pre_hook(zero))
    assert len(hooks) == 2, "the pattern names the two layers' projections"
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("site", SITES)
def test_a_named_tower_is_edited_and_no_other(site: str) -> None:
    make, projections = SITES[site]
    model, inputs = make()
    untouched = logits(model, inputs)
    with zeroed_by_hand(model, projections):
        expected = logits(model, inputs)
    with apply(model, AblateHeads(PICKED), tower=site):
        found = logits(model, inputs)
    size = float(expected.abs().max())
    assert float((expected - untouched).abs().max()) > 1e-3 * size
    assert float((found - expected).abs().max()) <= 1e-5 * size
    assert torch.equal(logits(model, inputs), untouched)


def test_towers_have_edits_of_their_own_and_a_trace_sees_both() -> None:
    model, inputs = llava()
    uniform = AblateHeads([(0, 1)], "uniform")
    with trace(model, [Entropy()], tower="vision") as plain:
        logits(model, inputs)
    with (
        apply(model, uniform, tower="vision"),
        apply(model, AblateHeads([(0, 0)])),
        trace(model, [Entropy()], tower="vision") as vision,
        trace(model, [Entropy()]) as language,
    ):
        logits(model, inputs)
    keys = vision.record.sizes["query"]
    edited, before = (t.record["entropy"].sel(layer=0).isel(query=0) for t in (vision, plain))
    assert abs(edited.sel(head=1) - torch.log(torch.tensor(float(keys))).item()).max() < 1e-5
    assert (edited.sel(head=0) == before.sel(head=0)).all()
    assert "language" in language.record.attrs["module"]


def test_heads_and_towers_that_do_not_exist_are_refused() -> None:
    model, inputs = llava()
    with pytest.raises(HeadscopeError, match="no tower 'visoin'"), apply(model, AblateHeads(PICKED), tower="visoin"):
        raise AssertionError("the block must not run")
    with pytest.raises(HeadscopeError, match="no attention layer in 'encoder'"):
        with apply(model, AblateHeads(PICKED), tower="encoder"):
            raise AssertionError("the block must not run")
    with pytest.raises(HeadscopeError, match="L7H0 does not exist"):
        with apply(model, AblateHeads([(7, 0)]), tower="vision"):
            raise AssertionError("the block must not run")
    with pytest.raises(HeadscopeError, match="L0H9 does not exist"):
        with apply(model, AblateHeads([(0, 9)]), tower="vision"):
            raise AssertionError("the block must not run")


def test_phases_of_cross_attention_are_refused() -> None:
    model, inputs = t5()
    edit = AblateHeads(PICKED, during="decode")
    with apply(model, edit, tower="cross"), pytest.raises(HeadscopeError, match="during='always'"):
        logits(model, inputs)
