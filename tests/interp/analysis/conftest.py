"""A tiny model with grouped heads that reads words, and the untouched model's own attention in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headscope.interp import load_model, tiny_model
from headscope.interp.models import LanguageModel

WORDS = 60


@pytest.fixture
def worded() -> LanguageModel:
    """4 query heads on 2 key/value heads in each of 2 layers, with weights wide enough that patterns differ."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=32, head_dim=8, vocab_size=WORDS)
    model = tiny_model("llama", seed=3, num_hidden_layers=2, initializer_range=0.3, **sizes)
    return load_model(model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0"))


@pytest.fixture
def words() -> list[str]:
    """Six texts of 40 words, in which words come again."""
    drawn = np.random.default_rng(0).integers(0, 20, (6, 40))
    return [" ".join(f"w{i}" for i in row) for row in drawn]


@pytest.fixture
def dense() -> Callable[[LanguageModel, list[str], int], tuple[np.ndarray, np.ndarray]]:
    """Token ids (text, length) and float64 eager weights (text, layer, head, query, key) of texts' beginnings."""

    def weights(lm: LanguageModel, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([[int(word[1:]) for word in text.split()[:length]] for text in texts])
        model = copy.deepcopy(lm.model).double()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            found = model(torch.from_numpy(ids), output_attentions=True).attentions
        return ids, torch.stack(found, 1).numpy()

    return weights
