"""A tiny model in which three heads alone write anything, so that the circuit is known."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.interp.models.language_model import LanguageModel
from headscope.probes.patching.pairs import Pairs

PLANTED = ((0, 1), (1, 2), (2, 3))


@pytest.fixture
def planted() -> LanguageModel:
    """Three layers of four heads that share two keys; the output projection is 0 but for the planted heads."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    more = dict(num_key_value_heads=2, head_dim=8, initializer_range=0.3, max_position_embeddings=64)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **more)).eval()
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            for head in range(4):
                if (layer, head) not in PLANTED:
                    block.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
    return LanguageModel.wrap(model, name="planted")


@pytest.fixture
def pairs() -> Pairs:
    """Eight pairs that differ in two tokens before the last, so that only heads bring the difference to the end."""
    draw = torch.Generator().manual_seed(1)
    clean = torch.randint(1, 40, (8, 9), generator=draw)
    corrupt = clean.clone()
    corrupt[:, 2:4] = torch.randint(1, 40, (8, 2), generator=draw)
    answers, others = torch.randint(1, 40, (2, 8), generator=draw)
    return Pairs(clean, corrupt, torch.full((8,), 9), answers, others, torch.zeros(8, dtype=torch.long))
