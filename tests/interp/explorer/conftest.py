"""A tiny model of words, and the untouched model's own weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp.models.language_model import LanguageModel

WORDS = 24
PROMPT = " ".join(f"w{(3 * i * i + i) % WORDS}" for i in range(150))


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    """Two layers of four heads, two key heads; one word has markup for a name."""
    names = {f"w{i}": i for i in range(WORDS)} | {"<img/src=x>": WORDS}
    inner = Tokenizer(models.WordLevel(names, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0")
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    more = dict(vocab_size=WORDS + 1, num_hidden_layers=2, initializer_range=0.4, max_position_embeddings=512)
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(bos_token_id=None, eos_token_id=None, pad_token_id=0, **sizes, **more)).eval()
    return LanguageModel.wrap(model, tokenizer, name="tiny llama")


def eager(model: Any, ids: list[int]) -> list[np.ndarray]:
    """A layer's weights (head, query, key) each, by the model's own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    return [one[0].double().numpy() for one in found]
