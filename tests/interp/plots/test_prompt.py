"""One head on one prompt: against the eager weights, whole or in blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp import plots
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.survey.eager import eager_weights


def worded() -> LanguageModel:
    """A random llama that reads the words w0 to w19."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *(f"w{i}" for i in range(20))])}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    torch.manual_seed(0)
    sizes = {"vocab_size": 21, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 512}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
    return LanguageModel.wrap(LlamaForCausalLM(config).eval(), tokenizer, name="worded")


@pytest.mark.parametrize("length", [200, 300])
def test_a_head_on_a_prompt_of_any_length(length: int) -> None:
    """Up to 256 tokens the eager weights of every pair; beyond, their means over blocks."""
    lm = worded()
    words = " ".join(f"w{i % 20}" for i in range(length))
    heat = plots.head_on_prompt(lm, words, 1, 2, log=False).data[0]
    with eager_weights(lm.model) as seen, torch.no_grad():
        lm.model(**lm.encode([words]), use_cache=False)
    p = seen[1][1][0, 2].numpy()
    if length <= 256:
        assert heat.z.shape == (length, length)
        np.testing.assert_allclose(np.nan_to_num(heat.z), p, atol=1e-5)  # 2^-24 x 300 terms of size 1 below it
        return
    means = p.reshape(length // 2, 2, length // 2, 2).mean(1).sum(2)  # (block, row, block, key)
    np.testing.assert_allclose(np.nan_to_num(heat.z), means, atol=1e-5)
