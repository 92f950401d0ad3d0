"""Shares of spans and of neurons sum to those of heads and MLPs, and are what plain hooks give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.statistics.spans import OPEN
from headscope.probes.lenses.anchored import anchor_lens
from headscope.probes.lenses.attribution import logit_shares
from headscope.probes.lenses.neurons import neuron_attribution
from headscope.probes.lenses.spans import span_attribution

TEXTS = ["w1 w2 w3", "w4 w5 w6 w7 w8", "w9"]

GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", GROUPED),
    ("gemma2", GROUPED),
    ("olmo2", {"num_key_value_heads": 2}),
    ("gpt2", {}),
    ("phi", {}),
]


def rms(x: torch.Tensor) -> torch.Tensor:
    return (x.pow(2).mean() + 1e-6).sqrt()


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_spans_that_part_the_text_sum_to_the_head(tiny: Any, kind: str, changes: dict[str, Any]) -> None:
    lm = tiny(kind, **changes)
    found = span_attribution(
        lm, TEXTS, [3, 5, 7], [4, 6, 8], spans={"one": (0, 1), "rest": (1, OPEN)}, batch_size=2, progress=False
    )
    whole = logit_shares(lm, TEXTS, [3, 5, 7], [4, 6, 8], progress=False)
    np.testing.assert_allclose(found.shares.sum(-1), whole.heads, atol=1e-4)  # float32 sums in another order
    assert np.abs(found.shares[1]).min(-1).max() > 1e-2
    assert found.shares[2, :, :, 1].any() == np.False_  # a text of one word has no rest
    np.testing.assert_array_equal(found.of("one").trials, found.shares[..., 0])
    assert len(found.to_frame()) == found.shares.size


def test_a_span_is_the_formula_written_out(tiny: Any) -> None:
    """w . gain / rms . W_O (sum over the span of p v), with the eager model's own pattern and values."""
    lm = tiny("llama", **GROUPED)
    found = span_attribution(lm, [TEXTS[1]], [5], [6], spans={"two": [[(1, 3)]]}, progress=False)
    lm.model.set_attn_implementation("eager")
    seen: dict[str, torch.Tensor] = {}
    block, final = lm.model.model.layers[1], lm.model.model.norm
    hooks = [
        block.self_attn.v_proj.register_forward_hook(lambda m, a, o: seen.update(v=o[0])),
        final.register_forward_hook(lambda m, a, o: seen.update(x=a[0][0, -1])),
    ]
    p = lm([TEXTS[1]], output_attentions=True).attentions[1][0, :, -1]
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        u = (lm.model.lm_head.weight[5] - lm.model.lm_head.weight[6]) * final.weight / rms(seen["x"])
        w, v = block.self_attn.o_proj.weight.view(32, 4, 8), seen["v"].view(-1, 2, 8)
        expected = torch.stack([u @ w[:, h] @ (p[h, 1:3] @ v[1:3, h // 2]) for h in range(4)])
    np.testing.assert_allclose(found.shares[0, 1, :, 0], expected.numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_neurons_sum_to_their_mlp(tiny: Any, kind: str, changes: dict[str, Any]) -> None:
    lm = tiny(kind, **changes)
    for name, parameter in lm.model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    found = neuron_attribution(lm, TEXTS[1], 5, 6)
    whole = logit_shares(lm, [TEXTS[1]], [5], [6], progress=False)
    np.testing.assert_allclose(found.shares.sum(1) + found.beside, whole.mlps[0], atol=1e-4)
    best = found.to_frame(3).iloc[0]
    assert abs(best["share"]) == np.abs(found.shares).max()


def test_a_neuron_with_its_own_scale_is_the_lens_of_what_it_writes_alone(tiny: Any) -> None:
    lm = tiny("gpt2")
    found = neuron_attribution(lm, TEXTS[1], 5, 6, scale="own")
    model, seen = lm.model, {}
    projection = model.transformer.h[1].mlp.c_proj
    hook = projection.register_forward_pre_hook(lambda m, a: seen.update(m=a[0][0, -1]))
    lm([TEXTS[1]])
    hook.remove()
    with torch.no_grad():
        written = seen["m"][:, None] * projection.weight + projection.bias
        logits = model.lm_head(model.transformer.ln_f(written))
    np.testing.assert_allclose(found.shares[1], (logits[:, 5] - logits[:, 6]).numpy(), atol=1e-4)
    with pytest.raises(HeadscopeError, match="against"):
        neuron_attribution(lm, TEXTS[1], 5, scale="own")
    with pytest.raises(HeadscopeError, match="a norm follows the MLP"):
        neuron_attribution(tiny("gemma2", **GROUPED), TEXTS[1], 5, 6, scale="own")


def test_everything_counts_the_adapters_of_peft(tiny: Any) -> None:
    """A LoRA-wrapped model gives what the merged one gives, for heads, spans, MLPs and neurons."""
    peft = pytest.importorskip("peft")
    lm = tiny("llama", **GROUPED)
    config = peft.LoraConfig(r=2, target_modules=["o_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(lm.model, config).eval()
    wrapped = LanguageModel.wrap(adapted, lm.tokenizer)

    def measured(one: LanguageModel) -> list[np.ndarray]:
        whole = logit_shares(one, TEXTS, [3, 5, 7], [4, 6, 8], progress=False)
        np.testing.assert_allclose(whole.total, whole.logits, atol=1e-4)
        spans = span_attribution(one, TEXTS, [3, 5, 7], spans={"one": (0, 1)}, progress=False)
        return [whole.heads, whole.mlps, spans.shares, neuron_attribution(one, TEXTS[1], 5, 6).shares]

    found = measured(wrapped)
    expected = measured(LanguageModel.wrap(adapted.merge_and_unload(), lm.tokenizer))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.slow
def test_on_smollm2_the_shares_sum_to_the_logit_difference(smollm2: LanguageModel) -> None:
    texts = ["The capital of France is", "When Mary and John went to the store, John gave a drink to"]
    found = logit_shares(smollm2, texts, [" Paris", " Mary"], [" London", " John"], progress=False)
    np.testing.assert_allclose(found.total, found.logits, atol=1e-4 * np.abs(found.heads).sum())
    assert (found.logits > 0).all()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_anchor_lens_is_the_final_norm_of_each_part_alone(tiny: Any, kind: str) -> None:
    lm = tiny(kind)
    found = anchor_lens(lm, [TEXTS[1]], [5], [6])
    seen: dict[str, torch.Tensor] = {}
    base = lm.model.transformer if kind == "gpt2" else lm.model.model
    block = (base.h if kind == "gpt2" else base.layers)[1]
    projection = block.attn.c_proj if kind == "gpt2" else block.self_attn.o_proj
    hooks = [
        block.mlp.register_forward_hook(lambda m, a, o: seen.update(mlp=o[0, -1])),
        projection.register_forward_pre_hook(lambda m, a: seen.update(z=a[0][0, -1])),
    ]
    lm([TEXTS[1]])
    for hook in hooks:
        hook.remove()
    w = projection.weight if kind == "gpt2" else projection.weight.T  # (head * d_value, d_model)
    with torch.no_grad():
        heads = torch.stack([seen["z"][8 * h : 8 * h + 8] @ w[8 * h : 8 * h + 8] for h in range(4)])
        norm = base.ln_f if kind == "gpt2" else base.norm
        logits = lm.model.lm_head(norm(torch.cat([heads, seen["mlp"][None]])))
    expected = (logits[:, 5] - logits[:, 6]).numpy()
    np.testing.assert_allclose(found.heads.mean[1], expected[:4], atol=1e-4)
    np.testing.assert_allclose(found.mlps[0, 1], expected[4], atol=1e-4)
