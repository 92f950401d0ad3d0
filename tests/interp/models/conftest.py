"""Random models of several architectures with a tokenizer of a few words, for the tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from headscope.interp.models import load_model

WORDS = ["<s>", "</s>", "<unk>", "user", "assistant", ":", *"abcdefghijklmnopqrstuvwxyz", "ab"]
SIZES = {"vocab_size": len(WORDS), "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
COMMON = SIZES | {"intermediate_size": 48, "max_position_embeddings": 16}
SHORT = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}

# name: (model class, configuration class, configuration, first layer's attention, first layer's projection)
TINY = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", COMMON | {"num_key_value_heads": 2}, "self_attn", "self_attn.o_proj"),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": len(WORDS), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
        "attn",
        "attn.c_proj",
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", COMMON, "attention", "attention.dense"),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        COMMON
        | {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        "self_attn",
        "self_attn.o_proj",
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "self_attn",
        "self_attn.out_proj",
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", COMMON, "self_attn", "self_attn.dense"),
    "bert": ("BertModel", "BertConfig", COMMON, "attention.self", "attention.output.dense"),
}


def _tiny(name: str = "llama", **changes):
    model_class, config_class, config, *_ = TINY[name]
    config = getattr(transformers, config_class)(**config | SHORT | changes)
    return getattr(transformers, model_class)(config).eval()


def _words(**kwargs) -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "tiny-llama"
    _tiny().save_pretrained(place)
    _words().save_pretrained(place)
    return place


@pytest.fixture
def lm():
    return load_model(_tiny(), tokenizer=_words())


def _says(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.fixture(params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    """Every architecture of the table, unless a test says which."""
    return str(request.param)


@pytest.fixture
def table() -> dict[str, tuple]:
    """The architectures of ``tiny``."""
    return TINY


@pytest.fixture
def vocabulary() -> list[str]:
    """The words of ``words``, by id."""
    return WORDS


@pytest.fixture
def tiny():
    """Builds a random model of an architecture of the table."""
    return _tiny


@pytest.fixture
def words():
    """Builds a tokenizer of the vocabulary."""
    return _words


@pytest.fixture
def says():
    """Asserts that an error is one line with these parts."""
    return _says
