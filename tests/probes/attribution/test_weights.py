"""Heads' matrices, composition and eigen-scores against the same written out with dense matrices in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.probes.attribution.composition import composition_scores
from headscope.probes.attribution.eigen import eigen_scores
from headscope.probes.paths.matrices import head_matrices

GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
Dense = dict[str, torch.Tensor]


def llama(lm: LanguageModel, layer: int, fold: bool) -> Dense:
    block = lm.model.model.layers[layer]
    gain = block.input_layernorm.weight.double() if fold else torch.ones(32).double()
    q, k, v, o = (getattr(block.self_attn, f"{name}_proj").weight.detach().double() for name in "qkvo")
    k, v = (x.view(2, 8, 32).repeat_interleave(2, 0) for x in (k, v))
    found = {"q": q.view(4, 8, 32) * gain, "k": k * gain, "v": v * gain, "o": o.view(32, 4, 8).transpose(0, 1)}
    return {name: x.detach() for name, x in found.items()}


@pytest.mark.parametrize("fold", [True, False])
def test_matrices_and_composition_of_a_llama_are_the_formula(tiny: Any, fold: bool) -> None:
    lm = tiny("llama", num_hidden_layers=3, **GROUPED)
    dense = [llama(lm, layer, fold) for layer in range(3)]
    for one, other in zip(head_matrices(lm, fold=fold), dense, strict=True):
        for name in "qkvo":
            torch.testing.assert_close(one.each(getattr(one, name)), other[name], atol=1e-5, rtol=1e-4)
    found = composition_scores(lm, fold=fold)
    assert np.isnan(found.q[1:, :, :2]).all() and np.isnan(found.v[0, :, 0]).all()
    first, later = dense[0], dense[2]
    for h1 in range(4):
        for h2 in range(4):
            ov = first["o"][h1] @ first["v"][h1]
            qk = later["q"][h2].T @ later["k"][h2]
            ov2 = later["o"][h2] @ later["v"][h2]
            for kind, left in (("q", qk.T), ("k", qk), ("v", ov2)):
                expected = (left @ ov).norm() / (left.norm() * ov.norm())
                assert found.of(kind)[0, h1, 2, h2] == pytest.approx(float(expected), rel=1e-4)  # type: ignore[arg-type]
    frame = found.to_frame("k", 5)
    assert len(frame) == 5 and frame["score"].iloc[0] == np.nanmax(found.k)
    some = composition_scores(lm, fold=fold, layers=[0, 2])
    np.testing.assert_array_equal(some.q[0, :, 2], found.q[0, :, 2])
    assert np.isnan(some.q[0, :, 1]).all()
    with pytest.raises(HeadscopeError, match="two layers"):
        composition_scores(lm, layers=[1])
    with pytest.raises(HeadscopeError, match="'q', 'k' or 'v'"):
        found.of("z")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma2", "gemma3_text", "olmo2", "qwen3", "phi3"])
def test_matrices_of_every_layout_give_values_and_writes(tiny: Any, kind: str) -> None:
    """W_V of the normed stream is the value that attention is given, and W_O z what a layer's heads write (first token:
    one key, so z is its value)."""
    changes = {} if kind in ("gpt2", "gpt_neox") else GROUPED if kind.startswith("g") else {"num_key_value_heads": 2}
    changes = changes | ({"pad_token_id": 0} if kind == "phi3" else {}) | ({"head_dim": 8} if kind == "qwen3" else {})
    lm = tiny(kind, **changes)
    one = head_matrices(lm, fold=False)[0]
    seen: dict[str, torch.Tensor] = {}
    attention = next(m for name, m in lm.model.named_modules() if name.endswith(("self_attn", ".attn", ".attention")))
    hook = attention.register_forward_hook(
        lambda m, a, k, o: seen.update(x=a[0] if a else k["hidden_states"], out=o[0]), with_kwargs=True
    )
    for name, parameter in lm.model.named_parameters():
        if name.endswith("bias") and ("attn" in name or "attention" in name):
            torch.nn.init.zeros_(parameter)
    lm.forward(torch.tensor([[3]]))
    hook.remove()
    x, out = seen["x"][0, -1].double(), seen["out"][0, -1].double()
    found = torch.einsum("hmv,hvd,d->m", one.o, one.each(one.v), x)
    torch.testing.assert_close(found, out, atol=1e-4, rtol=1e-3)


def test_eigen_scores_are_those_of_the_whole_vocabulary(tiny: Any) -> None:
    lm = tiny("llama", **GROUPED)
    one = llama(lm, 1, True)
    e = lm.model.model.embed_tokens.weight.detach().double()
    u = (lm.model.lm_head.weight * lm.model.model.norm.weight).detach().double()
    for circuit, tokens in (("ov", True), ("ov", False), ("qk", True), ("qk", False)):
        found = eigen_scores(lm, circuit, tokens=tokens)  # type: ignore[arg-type]
        for h in range(4):
            matrix = one["o"][h] @ one["v"][h] if circuit == "ov" else one["q"][h].T @ one["k"][h]
            if tokens:
                matrix = (u if circuit == "ov" else e) @ matrix @ e.T
            values = torch.linalg.eigvals(matrix)
            # 24 x 24 of rank 8: zeros come out as 1e-8 of the largest
            assert found.mean[1, h] == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=1e-4)
    assert found.method == "qk_eigen" and found.trials.shape == (1, 2, 4)


def test_hand_made_heads_copy_match_and_compose(tiny: Any) -> None:
    """OV = identity copies (1), minus it suppresses (-1); a head that writes where another reads composes fully."""
    lm = tiny("llama", num_key_value_heads=4, head_dim=8, tie_word_embeddings=True)
    with torch.no_grad():
        for block in lm.model.model.layers:
            block.input_layernorm.weight.fill_(1.0)
            at = block.self_attn
            at.v_proj.weight.copy_(torch.eye(32))
            at.o_proj.weight.copy_(torch.eye(32))
            at.o_proj.weight[8:16] *= -1
            at.q_proj.weight.copy_(torch.eye(32))
            at.k_proj.weight.copy_(torch.eye(32))
        lm.model.model.norm.weight.fill_(1.0)
    np.testing.assert_allclose(eigen_scores(lm, "ov", tokens=True).mean, [[1, -1, 1, 1]] * 2, atol=1e-5)
    np.testing.assert_allclose(eigen_scores(lm, "qk", tokens=False).mean, 1.0, atol=1e-5)
    found = composition_scores(lm)
    # head h writes to dimensions 8h..8h+8 alone: an equal head reads all of it, another nothing
    for kind in ("q", "k", "v"):
        np.testing.assert_allclose(found.of(kind)[0, :, 1], np.eye(4) / 8**0.5, atol=1e-6)  # type: ignore[arg-type]
    assert 0.1 < found.baseline["k"] < 0.35


@pytest.mark.slow
def test_on_smollm2_heads_compose_beyond_chance(smollm2: LanguageModel) -> None:
    """In the paper few pairs of heads stand out: the best is several times what random matrices give."""
    found = composition_scores(smollm2, layers=[0, 2, 4, 10, 17, 18])
    assert found.to_frame("k", 1)["score"].iloc[0] > 3 * found.baseline["k"]
