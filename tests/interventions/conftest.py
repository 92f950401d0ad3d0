"""Tiny random models from configurations, with a tokenizer of words: no download."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import load_haystack, load_needles

WORDS = 60
LAYERS, HEADS, D_HEAD = 2, 4, 8


def build(kind: str) -> LanguageModel:
    """Two layers of four heads of width 8, float32, with attention far from uniform (wide weights)."""
    torch.manual_seed(1)
    common = dict(vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.3)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=LAYERS, n_head=HEADS, n_embd=32, n_positions=128, **common))
    else:
        sizes = dict(hidden_size=32, intermediate_size=48, head_dim=D_HEAD, max_position_embeddings=128)
        groups = dict(num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2)
        if kind == "mistral":
            model = MistralForCausalLM(MistralConfig(sliding_window=4, **sizes, **groups, **common))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes, **groups, **common))
    vocabulary = {"<pad>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    return LanguageModel.wrap(model.eval(), tokenizer, name=f"tiny {kind}", revision="seed 1")


@pytest.fixture(scope="session")
def shared() -> Callable[[str], LanguageModel]:
    """A model of each kind for all tests that leave it as it is: made, and verified, once."""
    return cache(build)


@pytest.fixture(params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """A llama with grouped key/value heads, and a GPT-2, whose projections are transposed."""
    return build(request.param)


@pytest.fixture(params=["llama", "gpt2", "mistral"])
def wide_lm(request: pytest.FixtureRequest) -> LanguageModel:
    """These, and a mistral whose layers see a window of four tokens."""
    return build(request.param)


@pytest.fixture
def llama() -> LanguageModel:
    """The llama alone, where the architecture does not matter."""
    return build("llama")


@pytest.fixture(scope="session")
def reader() -> LanguageModel:
    """A tiny llama that reads bytes and common pieces."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<eos>"])
    needles = [" ".join([n.needle, n.question]) for n in load_needles(10)]
    inner.train_from_iterator([load_haystack()[:20_000], *needles], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=600, num_hidden_layers=2, initializer_range=0.3, eos_token_id=0, **sizes)
    return LanguageModel.wrap(LlamaForCausalLM(config).eval(), tokenizer, name="tiny", revision="seed 0")
