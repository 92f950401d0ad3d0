"""The logit lens is the norm and the unembedding at every depth, and ends at what the model says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.probes.lenses.logit_lens import logit_lens

TEXTS = ["w1 w2 w3", "w4 w5 w6 w7 w8", "w9"]

GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", GROUPED), ("gpt2", {}), ("gemma2", GROUPED), ("cohere", {"logit_scale": 0.25}), ("granite", {})],
)
def test_every_depth_is_the_norm_and_unembedding_of_the_stream(tiny: Any, kind: str, changes: dict[str, Any]) -> None:
    lm = tiny(kind, **changes)
    if kind == "granite":
        lm.model.config.logits_scaling = 3.0
    found = logit_lens(lm, TEXTS[1], "w3")
    with torch.no_grad():
        output = lm.model(**lm.encode(TEXTS[1]), output_hidden_states=True)
    own = output.logits[0].double().log_softmax(-1)
    base = getattr(lm.model, lm.model.base_model_prefix)
    norm = getattr(base, "norm", None) or base.ln_f
    assert found.entropy.shape == (3, 5)
    for depth in (0, 1):
        with torch.no_grad():
            logits = lm.model.get_output_embeddings()(norm(output.hidden_states[depth][0])).double()
        if kind == "gemma2":
            logits = 30.0 * torch.tanh(logits / 30.0)
        logits = logits * 0.25 if kind == "cohere" else logits / 3.0 if kind == "granite" else logits
        log_p = logits.log_softmax(-1)
        # float32 logits of about 10 in size: 2^-24 x 10 x sums of 32 terms
        np.testing.assert_allclose(found.entropy[depth], -(log_p.exp() * log_p).sum(-1), atol=1e-4)
        np.testing.assert_allclose(found.kl[depth], (own.exp() * (own - log_p)).sum(-1), atol=1e-4)
        np.testing.assert_allclose(found.log_p[depth], log_p[:, 5], atol=1e-4)
        np.testing.assert_array_equal(found.rank[depth], (log_p > log_p[:, 5:6]).sum(-1))
        np.testing.assert_array_equal(found.top[depth], log_p.argmax(-1))
    np.testing.assert_allclose(found.log_p[2], own[:, 5], atol=1e-5)
    assert not found.kl[2].any()
    assert len(found.to_frame()) == 15


def test_without_a_target_it_asks_about_the_next_token(tiny: Any) -> None:
    lm = tiny("llama")
    found = logit_lens(lm, TEXTS[1], positions=[0, -2, -1])
    assert found.positions.tolist() == [0, 3, 4]
    assert found.target.tolist() == [7, 10, -1]
    assert np.isnan(found.log_p[:, 2]).all() and (found.rank[:, 2] == -1).all()
    whole = logit_lens(lm, TEXTS[1])
    np.testing.assert_allclose(whole.kl[:, [0, 3, 4]], found.kl, atol=1e-5)
    with pytest.raises(HeadscopeError, match="do not all exist"):
        logit_lens(lm, TEXTS[1], positions=[5])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


@pytest.mark.slow
def test_on_smollm2_the_answer_rises_with_depth(smollm2: LanguageModel) -> None:
    found = logit_lens(smollm2, "The capital of France is", " Paris", positions=[-1])
    assert found.rank[0, 0] > 1000 > 10 > found.rank[-1, 0]
    assert found.kl[0, 0] > found.kl[-3, 0] > 0
