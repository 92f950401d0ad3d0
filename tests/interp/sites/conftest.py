"""Tiny models of several architectures, the same through each site: bridges, nnsight wrappers, and how to compare."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = SIZES | {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 8}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
TWO_KINDS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": None}
TINY = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, GROUPED),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, GROUPED | TWO_KINDS),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, GPT2),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, COMMON | {"rotary_pct": 0.25}),
    "gpt_oss": (
        tf.GptOssForCausalLM,
        tf.GptOssConfig,
        GROUPED | TWO_KINDS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        tf.DeepseekV3ForCausalLM,
        tf.DeepseekV3Config,
        COMMON | MLA | EXPERTS | {"num_key_value_heads": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "opt": (
        tf.OPTForCausalLM,
        tf.OPTConfig,
        {key: value for key, value in COMMON.items() if key != "intermediate_size"}
        | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "bloom": (tf.BloomForCausalLM, tf.BloomConfig, {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "qwen3_next": (
        tf.Qwen3NextForCausalLM,
        tf.Qwen3NextConfig,
        GROUPED
        | LINEAR
        | {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
}


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    model, config, sizes = TINY[name]
    made = model(config(**sizes)).eval()
    for parameter in made.parameters():  # large enough that every head attends its own way
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    return made


def bridge_of(model: Any) -> Any:
    own = copy.deepcopy(model)  # a bridge changes its model in place
    return build_bridge_from_module(own, type(own).__name__, hf_config=own.config)


def prompt(name: str) -> dict[str, Tensor]:
    ids = torch.randint(2, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    if name not in ("gpt2", "opt"):  # a bridge gives left-padded tokens other absolute positions than transformers does
        mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def real(inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    return logits[inputs["attention_mask"].bool()]


def run_bridge(bridge: Any, inputs: dict[str, Tensor]) -> Tensor:
    return bridge(inputs["input_ids"], attention_mask=inputs["attention_mask"])


def run_nnsight(wrapper: Any, inputs: dict[str, Tensor]) -> Tensor:
    with wrapper.trace(**inputs):
        logits = wrapper.output.logits.save()
    return logits


def largest_difference(one: Any, other: Any) -> float:
    assert dict(one.sizes) == dict(other.sizes) and list(one.data_vars) == list(other.data_vars)
    assert one.attrs["module"] == other.attrs["module"]
    return max(float(abs(one[name].astype(float) - other[name].astype(float)).max()) for name in one.data_vars)


def hooks_on(model: Any) -> list[Any]:
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(getattr(module, "fwd_hooks", ())))
        for name, module in model.named_modules()
    ]


@pytest.fixture(scope="session")
def kit() -> Any:
    """The functions above, for tests of every site."""
    functions = (tiny, bridge_of, prompt, real, run_bridge, run_nnsight, largest_difference, hooks_on)
    return SimpleNamespace(TINY=TINY, **{function.__name__: function for function in functions})
