"""Copying scores against the model's own modules written out in float64, and of heads that copy by construction."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from headscope.interp import heads, load_model
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.unembedding import to_logits
from headscope.interp.prompts.tokens import random_tokens
from headscope.interp.survey.tiny import tiny_model

QUIET = {"progress": False}


def by_hand(lm, words: torch.Tensor, top: int) -> np.ndarray:
    """Scores (layer, head) of BOS and words, module by module."""
    model = copy.deepcopy(lm.model).double()
    ids = torch.cat([torch.tensor([60]), words])[None]
    scores = np.zeros((len(model.model.layers), 4))
    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[1]
        for i, layer in enumerate(model.model.layers):
            values = layer.self_attn.v_proj(layer.input_layernorm(x))[0, 1:].unflatten(-1, (2, 8))
            for head in range(4):
                out = layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8]
                logits = model.lm_head(model.model.norm(values[:, head // 2] @ out.T))
                order = logits.argsort(-1, descending=True)[:, :top]
                scores[i, head] = (order == words[:, None]).any(-1).double().mean()
    return scores


def test_scores_are_those_of_the_models_modules(make_grouped) -> None:
    lm = make_grouped(layers=3)
    found = heads.copying(lm, length=20, samples=3, top=7, seed=2, **QUIET)
    want = [by_hand(lm, random_tokens(lm, 20, [2, i]), 7) for i in range(3)]
    np.testing.assert_allclose(found.trials, want, rtol=0, atol=1e-12)  # counts: no logit is as near as rounding
    assert 0 < found.mean.min() < found.mean.max() < 0.5


def test_a_head_that_copies_and_one_that_says_anything_else(make_grouped) -> None:
    """Tokens are unit vectors of 8 dimensions, which the first head passes on and the second turns around."""
    lm = make_grouped()
    model = lm.model
    with torch.no_grad():
        vectors = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        vectors /= vectors.norm(dim=-1, keepdim=True)
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight.zero_()
            weight[:, :8] = vectors
        for layer in model.model.layers:
            attention = layer.self_attn
            layer.mlp.down_proj.weight.mul_(1e-3)
            attention.v_proj.weight.zero_()
            attention.v_proj.weight[:8, :8] = torch.eye(8)
            attention.o_proj.weight.mul_(1e-3)  # the nearest of 64 vectors is much farther than what this adds
        last = model.model.layers[1].self_attn.o_proj.weight
        last[:8, :8], last[:8, 8:16] = torch.eye(8), -torch.eye(8)
    found = heads.copying(lm, length=30, samples=2, top=1, **QUIET)
    assert found.mean[1].tolist()[:2] == [1.0, 0.0]


def test_biases_and_layer_norms(make_grouped) -> None:
    """GPT-2: the projection's bias is not the head's; the final norm and tied unembedding are found."""
    model = tiny_model("gpt2")
    lm = load_model(model)
    x = torch.randn(3, model.config.n_embd)
    with torch.no_grad():
        torch.testing.assert_close(to_logits(lm)(x), model.lm_head(model.transformer.ln_f(x)))
    before = heads.copying(lm, length=6, samples=1, **QUIET).trials
    with torch.no_grad():
        for block in list(model.transformer.h)[1:]:
            block.attn.c_proj.bias.add_(3.0)
    np.testing.assert_array_equal(heads.copying(lm, length=6, samples=1, **QUIET).trials, before)


def test_nothing_stays_on_the_model(grouped) -> None:
    ids = torch.arange(8)[None]
    before = grouped.forward(ids).logits
    heads.copying(grouped, length=6, samples=1, **QUIET)
    assert torch.equal(grouped.forward(ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in grouped.model.modules())


def test_bad_input(grouped) -> None:
    with pytest.raises(HeadscopeError, match="1 logit or more"):
        heads.copying(grouped, top=0, **QUIET)
    with pytest.raises(HeadscopeError, match="a norm or a factor comes between"):
        heads.copying(tiny_model("gemma2"), length=4, samples=1, **QUIET)
    with torch.no_grad():
        grouped.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(HeadscopeError, match="not numbers"):
        heads.copying(grouped, length=4, samples=1, **QUIET)


@pytest.mark.slow
def test_smollm2s_induction_heads_copy(smollm2) -> None:
    copies = heads.copying(smollm2, samples=1, length=12, **QUIET).mean
    prefix = heads.induction(smollm2, samples=2, **QUIET).mean
    best = np.argsort(-prefix, axis=None)[:10]
    print(np.sort(copies, axis=None)[-5:], copies.ravel()[best], copies.mean())
    assert copies.max() > 0.4 and copies.ravel()[best].mean() > 2 * copies.mean()
