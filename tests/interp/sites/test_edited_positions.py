"""Edits of positions through TransformerLens and nnsight: the logits that they give through transformers.

Tolerance: 1e-5 of the largest logit, float32 attention in another order of summation.
"""

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch

from headscope.interventions import ConcentricPositions, Intervention, ParallelContexts, Pine, RescaleRoPE, apply

DOCUMENTS = [(2, 5), (5, 9)]
EDITS = [
    Pine(documents=DOCUMENTS),
    RescaleRoPE(linear=2.0),
    RescaleRoPE([(0, 1), (1, 2)], ntk=4.0),
    ParallelContexts(contexts=DOCUMENTS),
    ConcentricPositions(span=(2, 8), grid=(2, 3)),
]


@pytest.mark.parametrize("edit", EDITS, ids=[edit.name for edit in EDITS])
def test_every_framework_gives_the_same(kit: Any, edit: Intervention) -> None:
    model, inputs = kit.tiny("llama"), kit.prompt("llama")
    bridge, wrapper = kit.bridge_of(model), nnsight.NNsight(model)
    with torch.no_grad():
        plain = kit.real(inputs, model(**inputs).logits)
        with apply(model, edit):
            wanted = kit.real(inputs, model(**inputs).logits)
        with apply(bridge, edit):
            found = kit.real(inputs, kit.run_bridge(bridge, inputs))
        with apply(wrapper, edit):
            other = kit.real(inputs, kit.run_nnsight(wrapper, inputs))
    size = float(wanted.abs().max())
    assert float((plain - wanted).abs().max()) > 1e-2 * size
    assert float((found - wanted).abs().max()) <= 1e-5 * size and float((other - wanted).abs().max()) <= 1e-5 * size
