"""A tiny model with grouped heads and a tokenizer of words, its own eager attention in float64, and padded prompts."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp import load_model
from headscope.interp.models import LanguageModel
from headscope.interp.prompts import load_haystack, load_needles

WORDS, BOS = 60, 60  # ids of ordinary words are 0..59


def words() -> PreTrainedTokenizerFast:
    """Words w0..w59, and a BOS that it puts before every text."""
    plain = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)} | {"<s>": BOS}, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", pad_token="<s>")


@pytest.fixture(scope="session")
def byte_level() -> Callable[[int], PreTrainedTokenizerFast]:
    """Builds a byte-level tokenizer of so many tokens, trained on the bundled novel and needles."""

    @functools.cache
    def trained(size: int) -> Tokenizer:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=["<eos>"])
        inner.train_from_iterator([load_haystack()[:20_000] + " ".join(n.needle for n in load_needles(10))], trainer)
        return inner

    return lambda size: PreTrainedTokenizerFast(tokenizer_object=trained(size), eos_token="<eos>")


@pytest.fixture
def make_grouped() -> Callable[..., LanguageModel]:
    """Builds a llama with 4 query heads on 2 key/value heads, whose wide weights make attention far from uniform."""

    def build(layers: int = 2, **changes: object) -> LanguageModel:
        sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        common = dict(vocab_size=64, bos_token_id=BOS, eos_token_id=None, pad_token_id=None, initializer_range=0.3)
        common |= {"num_hidden_layers": layers, "max_position_embeddings": 128} | changes
        torch.manual_seed(1)
        return load_model(LlamaForCausalLM(LlamaConfig(**sizes, **common)).eval(), tokenizer=words())

    return build


@pytest.fixture
def grouped(make_grouped: Callable[..., LanguageModel]) -> LanguageModel:
    return make_grouped()


@pytest.fixture
def texts() -> list[str]:
    """Eight texts of 40 words and a BOS."""
    drawn = np.random.default_rng(0).integers(0, WORDS, (8, 40))
    return [" ".join(f"w{i}" for i in row) for row in drawn]


@pytest.fixture
def eager() -> Callable[..., np.ndarray]:
    """The untouched model's own attention weights in float64: (example, layer, head, query, key)."""

    def weights(lm: LanguageModel, ids: torch.Tensor, **inputs: torch.Tensor) -> np.ndarray:
        model = copy.deepcopy(lm.model).double()
        model.set_attn_implementation("eager")
        with torch.no_grad():
            return torch.stack(model(ids, output_attentions=True, **inputs).attentions, 1).numpy()

    return weights


@pytest.fixture
def ids_of() -> Callable[[LanguageModel, list[str], int], torch.Tensor]:
    """The first tokens of texts: (text, length)."""

    def encoded(lm: LanguageModel, texts: list[str], length: int) -> torch.Tensor:
        return torch.tensor([lm.tokenizer(text)["input_ids"][:length] for text in texts])

    return encoded


@pytest.fixture(params=["left", "right"])
def padded(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """Three prompts of unequal length in one batch: ids, attention mask, and where each one's tokens stand."""
    lengths, width = (14, 9, 12), 14
    drawn = torch.randint(0, WORDS, (3, width), generator=torch.Generator().manual_seed(2))
    at = [slice(width - n, width) if request.param == "left" else slice(0, n) for n in lengths]
    mask = torch.zeros(3, width, dtype=torch.long)
    for row, place in zip(mask, at, strict=True):
        row[place] = 1
    return drawn, mask, at
