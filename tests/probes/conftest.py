"""Tiny models of many architectures with a tokenizer of words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from headscope.interp.models.language_model import LanguageModel

SIZES = dict(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.3,
)
WORDS = [f"w{i}" for i in range(22)]


def build(kind: str, **changes: Any) -> LanguageModel:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<unk>", *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **changes})).eval()
    for name, parameter in model.named_parameters():  # gains and shifts that matter
        if "norm" in name or "ln_" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return LanguageModel.wrap(model, tokenizer, name=kind)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """Builds one: ``tiny("llama", num_key_value_heads=2)``."""
    return build
