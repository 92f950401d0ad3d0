"""What a model is: its sizes, from any configuration."""

from __future__ import annotations

import pytest
import torch
import transformers

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import ModelInfo, output_projections

SIZES = {"vocab_size": 33, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
COMMON = SIZES | {"intermediate_size": 48, "max_position_embeddings": 16}


def test_info_reads_every_configuration(name, tiny, vocabulary, table):
    model = tiny(name)
    info = ModelInfo.from_model(model)
    assert (info.architecture, info.model_type) == (table[name][0], name)
    assert (info.layers, info.heads, info.d_model, info.context_length) == (2, 4, 32, 16)
    assert info.kv_heads == {"llama": 2, "gemma3_text": 1}.get(name, 4)
    assert info.d_head == info.d_value == (16 if name == "gemma3_text" else 8)
    assert info.sliding_window == ((5, None) if name == "gemma3_text" else None)
    assert (info.dtype, info.device, info.vocab_size) == ("float32", "cpu", len(vocabulary))
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.attention_implementation == "sdpa"


def test_info_of_unusual_attention():
    latent = transformers.DeepseekV3Config(
        **COMMON | {"qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10, "kv_lora_rank": 8},
        q_lora_rank=8,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        moe_intermediate_size=8,
    )
    info = ModelInfo.from_model(transformers.DeepseekV3ForCausalLM(latent))
    assert (info.d_head, info.d_value) == (16, 10)
    everywhere = transformers.MistralConfig(**COMMON | {"num_key_value_heads": 2, "sliding_window": 7})
    assert ModelInfo.from_model(transformers.MistralForCausalLM(everywhere)).sliding_window == (7, 7)
    falcon = transformers.FalconConfig(**SIZES)
    assert ModelInfo.from_model(transformers.FalconForCausalLM(falcon)).kv_heads == 1


def test_info_of_the_text_tower(table):
    text = table["llama"][2] | {"model_type": "llama"}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"image_size": 8, "patch_size": 4, "intermediate_size": 16}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)
    model = transformers.LlavaForConditionalGeneration(config)
    info = ModelInfo.from_model(model)
    assert (info.architecture, info.model_type, info.heads) == ("LlavaForConditionalGeneration", "llama", 4)
    assert list(output_projections(model).values()) == [
        f"model.language_model.layers.{layer}.self_attn.o_proj" for layer in range(2)
    ]
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_info_refuses_what_has_no_heads(says):
    with pytest.raises(HeadscopeError) as error:
        ModelInfo.from_model(torch.nn.Linear(2, 2))
    says(error, "Linear is not a Hugging Face model")
