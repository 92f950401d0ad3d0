"""Output projections, found by watching one forward."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import ModelInfo, output_projections


def test_output_projections(name, tiny, table):
    model = tiny(name)
    modules = dict(model.named_modules())
    found = output_projections(model)
    _, _, _, attention, projection = table[name]
    prefixes = [key.removesuffix(attention) for key in found]
    assert all(key.endswith(f".{attention}") for key in found)
    assert found == {f"{prefix}{attention}": f"{prefix}{projection}" for prefix in prefixes}
    assert [prefix.rstrip(".")[-1] for prefix in prefixes] == ["0", "1"]
    width = ModelInfo.from_model(model).heads * ModelInfo.from_model(model).d_value
    for leaf in found.values():
        weight = modules[leaf].weight
        assert weight.shape[0 if name == "gpt2" else 1] == width  # GPT-2's Conv1D is stored transposed


def test_probing_leaves_the_model_as_it_was(lm):
    lm.model.train()
    lm.model.model.layers[0].eval()
    training = [module.training for module in lm.model.modules()]
    state, before = torch.random.get_rng_state(), lm.model.eval()(**lm.encode("a b c")).logits
    for module, was in zip(lm.model.modules(), training, strict=True):
        module.training = was
    assert output_projections(lm)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in lm.model.modules()] == training
    untouched(lm.model)
    assert torch.equal(lm.model.eval()(**lm.encode("a b c")).logits, before)


def untouched(model) -> None:
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert "headscope_projection_probe" not in interface._global_mapping


def test_probing_restores_after_an_exception(tiny, says):
    model = tiny()

    def broken(*args, **kwargs):
        raise IndexError("broken layer")

    model.model.layers[1].mlp.forward = broken
    with pytest.raises(HeadscopeError) as error:
        output_projections(model)
    says(error, "broken layer")
    untouched(model)


@pytest.mark.parametrize("name", ["Bloom", "Falcon", "GPTJ", "Mpt"])
def test_models_that_do_not_route_are_refused(name, says):
    sizes = {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    before = config._attn_implementation
    with pytest.raises(HeadscopeError) as error:
        output_projections(model)
    says(error, f"{name}ForCausalLM does not call transformers' attention interface")
    assert config._attn_implementation == before


def test_gated_heads_are_refused(monkeypatch, tiny, says):
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: (args[0] * 2,), prepend=True)
    with pytest.raises(HeadscopeError) as error:
        output_projections(model)
    says(error, "model.layers.0.self_attn", "unchanged")
