"""Direct logit attribution: shares add up to the logits, and models it is not defined for are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.probes.lenses.attribution import logit_attribution

SIZES = dict(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.3,
)
WORDS = [f"w{i}" for i in range(22)]
TEXTS = ["w1 w2 w3", "w4 w5 w6 w7 w8", "w9"]


def tiny(kind: str, **changes: Any) -> LanguageModel:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<unk>", *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **changes})).eval()
    for name, parameter in model.named_parameters():  # gains and shifts that matter
        if "norm" in name or "ln_" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return LanguageModel.wrap(model, tokenizer, name=kind)


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


def test_llama_shares_are_the_formula_written_out() -> None:
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
def test_with_heads_as_the_only_difference_the_shares_add_up_to_the_logits(kind: str) -> None:
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


def test_a_norm_after_the_heads_is_refused_by_name() -> None:
    lm = tiny("gemma2", num_key_value_heads=2, head_dim=8)
    with pytest.raises(HeadscopeError, match="gemma2.*does not add its heads' outputs"):
        logit_attribution(lm, TEXTS, [1, 2, 3], progress=False)


def test_bad_targets_are_refused_and_nothing_stays_on_the_model() -> None:
    lm = tiny("llama")
    with pytest.raises(HeadscopeError, match="2 tokens"):
        logit_attribution(lm, TEXTS[:1], ["w1 w2"], progress=False)
    with pytest.raises(HeadscopeError, match="one target token a text"):
        logit_attribution(lm, TEXTS, [1], progress=False)
    logit_attribution(lm, TEXTS, [1, 2, 3], progress=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


class Adapted(torch.nn.Module):
    """A projection under a low-rank adapter, built as peft builds one."""

    def __init__(self, base_layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, base_layer.out_features, bias=False)
        torch.nn.init.normal_(self.lora_B.weight, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_an_adapter_of_the_output_projection_counts() -> None:
    """Against the model with the adapter's matrices added to its weights."""
    merged, adapted = tiny("llama"), tiny("llama")
    for mine, theirs in zip(adapted.model.model.layers, merged.model.model.layers, strict=True):
        adapter = mine.self_attn.o_proj = Adapted(mine.self_attn.o_proj)
        with torch.no_grad():
            theirs.self_attn.o_proj.weight += adapter.lora_B.weight @ adapter.lora_A.weight
    want, got = (logit_attribution(lm, TEXTS, ["w4", "w5", "w6"], progress=False) for lm in (merged, adapted))
    np.testing.assert_allclose(got.trials, want.trials, atol=1e-4)
    plain = logit_attribution(tiny("llama"), TEXTS, ["w4", "w5", "w6"], progress=False)
    assert np.abs(plain.trials - want.trials).max() > 1e-2
