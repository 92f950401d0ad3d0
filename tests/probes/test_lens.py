"""Direct logit attribution: shares add up to the logits, and models it is not defined for are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.probes.lenses.attribution import logit_attribution, logit_shares

TEXTS = ["w1 w2 w3", "w4 w5 w6 w7 w8", "w9"]


def written_out(lm: LanguageModel, text: str, layer: int, target: int, other: int) -> torch.Tensor:
    """The formula written out for a llama: (w_target - w_other) * gain / rms . W_O z, for every head."""
    seen: dict[str, torch.Tensor] = {}
    block = lm.model.model.layers[layer]
    hooks = [
        block.self_attn.o_proj.register_forward_hook(lambda m, a, o: seen.update(z=a[0][0, -1])),
        lm.model.model.norm.register_forward_hook(lambda m, a, o: seen.update(x=a[0][0, -1])),
    ]
    lm([text])
    for hook in hooks:
        hook.remove()
    scale = (seen["x"].pow(2).mean() + lm.model.config.rms_norm_eps).rsqrt()
    u = (lm.model.lm_head.weight[target] - lm.model.lm_head.weight[other]) * lm.model.model.norm.weight * scale
    return torch.stack(
        [u @ block.self_attn.o_proj.weight[:, h * 8 : h * 8 + 8] @ seen["z"][h * 8 :][:8] for h in range(4)]
    )


def test_llama_shares_are_the_formula_written_out(tiny: Any) -> None:
    lm = tiny("llama", num_key_value_heads=2)
    found = logit_attribution(lm, TEXTS, ["w3", 5, "w7"], ["w4", 6, "w8"], batch_size=2, progress=False)
    assert found.trials.shape == (3, 2, 4)
    pairs = [tuple(row["target"]) for row in found.details]
    assert pairs[1] == (5, 6)
    for example, text in enumerate(TEXTS):
        for layer in range(2):
            with torch.no_grad():
                expected = written_out(lm, text, layer, *pairs[example])
            np.testing.assert_allclose(found.trials[example, layer], expected.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_with_heads_as_the_only_difference_the_shares_add_up_to_the_logits(tiny: Any, kind: str) -> None:
    """MLPs of zeros and no attention biases: the logits are the embedding's share and the heads', nothing else."""
    lm = tiny(kind)
    for name, parameter in lm.model.named_parameters():
        if "mlp" in name:
            torch.nn.init.zeros_(parameter)
        if name.endswith("bias") and ("attn" in name or "attention" in name):
            torch.nn.init.zeros_(parameter)
    seen: list[torch.Tensor] = []
    base = getattr(lm.model, lm.model.base_model_prefix)
    first = (getattr(base, "layers", None) or base.h)[0]
    hook = first.register_forward_pre_hook(
        lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    logits = lm([TEXTS[1]]).logits[0, -1]
    hook.remove()
    norm = next(m for name, m in base.named_modules() if name in ("norm", "ln_f", "final_layer_norm"))
    kept: list[torch.Tensor] = []
    hook = norm.register_forward_pre_hook(lambda m, a: kept.append(a[0][0, -1]))
    lm([TEXTS[1]])
    hook.remove()
    with torch.no_grad():
        x, embedded = kept[0], seen[0][0, -1]
        if isinstance(norm, torch.nn.LayerNorm):
            scale = (x.var(unbiased=False) + norm.eps).rsqrt()
            direct = (embedded - embedded.mean()) * scale * norm.weight + norm.bias
        else:
            direct = embedded * (x.pow(2).mean() + norm.variance_epsilon).rsqrt() * norm.weight
        rest = logits - lm.model.get_output_embeddings()(direct)
    for target in (3, 11):
        found = logit_attribution(lm, [TEXTS[1]], [target], progress=False)
        assert abs(found.trials.sum()) > 1e-2
        np.testing.assert_allclose(found.trials.sum(), float(rest[target]), rtol=2e-3, atol=2e-4)


class Lora(torch.nn.Module):
    """A projection with an adapter beside it, as peft builds it: base_layer(x) + B A x."""

    def __init__(self, base: torch.nn.Linear, size: float) -> None:
        super().__init__()
        self.base_layer = base
        self.a = torch.nn.Linear(base.in_features, 3, bias=False)
        self.b = torch.nn.Linear(3, base.out_features, bias=False)
        torch.nn.init.normal_(self.a.weight, std=size)
        torch.nn.init.normal_(self.b.weight, std=size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(x) + self.b(self.a(x))
        return out


@pytest.mark.parametrize("size", [0.03, 1.0])
def test_an_adapter_of_the_output_projection_counts(tiny: Any, size: float) -> None:
    """The shares are those of the merged weights W + B A; small adapters were left out, large ones refused."""
    lm, merged = tiny("llama"), tiny("llama")
    for layer, plain in zip(lm.model.model.layers, merged.model.model.layers, strict=True):
        lora = layer.self_attn.o_proj = Lora(layer.self_attn.o_proj, size)
        with torch.no_grad():
            plain.self_attn.o_proj.weight += lora.b.weight @ lora.a.weight
    found = logit_attribution(lm, TEXTS, [3, 5, 7], [4, 6, 8], progress=False)
    for example, text in enumerate(TEXTS):
        for layer in range(2):
            with torch.no_grad():
                expected = written_out(merged, text, layer, 3 + 2 * example, 4 + 2 * example)
            # matrix products summed in another order: 2^-24 x about 32 terms x sizes of 10 and below
            np.testing.assert_allclose(found.trials[example, layer], expected.numpy(), rtol=1e-4, atol=2e-5)


def test_the_adapters_of_peft_count(tiny: Any) -> None:
    peft = pytest.importorskip("peft")
    lm = tiny("llama")
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(lm.model, config).eval()
    found = logit_attribution(LanguageModel.wrap(adapted, lm.tokenizer), TEXTS, [3, 5, 7], progress=False)
    merged = LanguageModel.wrap(adapted.merge_and_unload(), lm.tokenizer)
    expected = logit_attribution(merged, TEXTS, [3, 5, 7], progress=False)
    np.testing.assert_allclose(found.trials, expected.trials, rtol=1e-3, atol=1e-4)


def rms(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return (x.pow(2).mean() + eps).sqrt()


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo2"])
def test_a_norm_after_the_heads_is_held_still(tiny: Any, kind: str) -> None:
    """The formula written out: w . gain_final / rms(x) * (gain_after / rms(sum of W_O z)) * W_O z."""
    lm = tiny(kind, num_key_value_heads=2, head_dim=8)
    seen: dict[str, torch.Tensor] = {}
    block, final = lm.model.model.layers[0], lm.model.model.norm
    after = block.post_attention_layernorm
    hooks = [
        block.self_attn.o_proj.register_forward_hook(lambda m, a, o: seen.update(z=a[0][0, -1], mixed=o[0, -1])),
        final.register_forward_hook(lambda m, a, o: seen.update(x=a[0][0, -1])),
    ]
    lm([TEXTS[1]])
    for hook in hooks:
        hook.remove()
    plus = 0 if kind == "olmo2" else 1  # Gemma's gain is 1 + weight
    with torch.no_grad():
        u = (lm.model.get_output_embeddings().weight[5] - lm.model.get_output_embeddings().weight[6]) * (
            final.weight + plus
        )
        u = u / rms(seen["x"]) * (after.weight + plus) / rms(seen["mixed"])
        z = seen["z"].view(4, -1)
        w = block.self_attn.o_proj.weight.view(32, 4, -1)
        expected = torch.stack([u @ w[:, h] @ z[h] for h in range(4)])
    found = logit_attribution(lm, [TEXTS[1]], [5], [6], progress=False)
    # float32 sums of about 32 terms in another order: 2^-24 x 32 x terms of 10 and below
    np.testing.assert_allclose(found.trials[0, 0], expected.numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 8}),
        ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8}),
        ("olmo2", {"num_key_value_heads": 2}),
        ("phi", {}),
    ],
)
def test_all_shares_sum_to_the_models_own_logits(tiny: Any, kind: str, changes: dict[str, Any]) -> None:
    lm = tiny(kind, **changes)
    for name, parameter in lm.model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    found = logit_shares(lm, TEXTS, [3, 5, 7], [4, 6, 8], batch_size=2, progress=False)
    logits = [lm([text], **{}).logits[0, -1].double() for text in TEXTS]
    own = [float(x[3 + 2 * i] - x[4 + 2 * i]) for i, x in enumerate(logits)]
    cap = getattr(lm.model.config, "final_logit_softcapping", None)
    if cap is not None:  # the shares are of the logits before it
        raw = [cap * torch.atanh(x / cap) for x in logits]
        own = [float(x[3 + 2 * i] - x[4 + 2 * i]) for i, x in enumerate(raw)]
    # logits are of about 10, sums of some 100 float32 terms in another order
    np.testing.assert_allclose(found.logits, own, atol=1e-4)
    np.testing.assert_allclose(found.total, found.logits, atol=1e-4)
    assert np.abs(found.heads).sum() > 1 and np.abs(found.mlps).sum() > 1
    frame = found.to_frame()
    np.testing.assert_allclose(frame.groupby("text")["share"].sum(), found.total, atol=1e-9)


def test_a_factor_after_the_heads_is_refused_by_name(tiny: Any) -> None:
    lm = tiny("granite", residual_multiplier=0.2)
    with pytest.raises(HeadscopeError, match="granite.*does not add its heads' outputs"):
        logit_attribution(lm, TEXTS, [1, 2, 3], progress=False)


def test_bad_targets_are_refused_and_nothing_stays_on_the_model(tiny: Any) -> None:
    lm = tiny("llama")
    with pytest.raises(HeadscopeError, match="2 tokens"):
        logit_attribution(lm, TEXTS[:1], ["w1 w2"], progress=False)
    with pytest.raises(HeadscopeError, match="one target token a text"):
        logit_attribution(lm, TEXTS, [1], progress=False)
    logit_attribution(lm, TEXTS, [1, 2, 3], progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
