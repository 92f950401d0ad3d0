"""Explicit maps against eager attention weights, and their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import LanguageModel
from headscope.interp.sites import attached
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.maps import head_pattern, patterns
from headscope.kernels.redistribution import Redistribution
from headscope.kernels.score_edits import distance_slope

PROMPT = " ".join(f"w{i % 7}" for i in range(30))
SIZES = dict(
    vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8
)


@pytest.fixture(params=["llama", "gemma3 with a window of 8"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """Tiny random models with grouped key/value heads; one with a sliding window."""
    shared = dict(num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, **SIZES)
    config = LlamaConfig(**shared) if request.param == "llama" else Gemma3TextConfig(sliding_window=8, **shared)
    inner = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i + 1 for i in range(7)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    return LanguageModel.wrap(AutoModelForCausalLM.from_config(config).eval(), tokenizer)


def eager(lm: LanguageModel) -> np.ndarray:
    """Attention weights (layer, head, query, key) of the model under eager attention."""
    before = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = lm.model(**lm.encode([PROMPT]), output_attentions=True).attentions
    lm.model.set_attn_implementation(before)
    return torch.stack(weights, dim=1)[0].numpy()


def test_patterns_are_the_eager_weights(lm: LanguageModel) -> None:
    truth = eager(lm)
    # scores of size |s| carry an error of eps |s| through exp; 64 covers |s| of these weights and the layer before
    bound = 64 * np.finfo(np.float32).eps
    found, tokens = patterns(lm, PROMPT)
    assert found.shape == truth.shape == (2, 4, 30, 30) and len(tokens) == 30
    assert np.abs(found - truth).max() <= bound
    assert np.abs(np.roll(found, 1, axis=1) - truth).max() > 100 * bound  # another head's map would be noticed
    one_layer, _ = patterns(lm, PROMPT, layer=1)
    one_head, _ = head_pattern(lm, PROMPT, 1, 3)
    np.testing.assert_allclose(one_layer, found[1], atol=bound)
    np.testing.assert_allclose(one_head, found[1, 3], atol=bound)


def test_limit_is_said_before_anything_runs(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(lm.model.model, "forward", fail)
    with pytest.raises(HeadscopeError, match=r"take \d+ MiB, more than the limit"):
        patterns(lm, PROMPT, limit_mib=0.001)


@pytest.mark.parametrize(("layer", "head"), [(2, 0), (0, 4), (-1, 0)])
def test_heads_that_do_not_exist(lm: LanguageModel, layer: int, head: int) -> None:
    with pytest.raises(HeadscopeError, match="does not exist"):
        head_pattern(lm, PROMPT, layer, head)


class Edit(Handler):
    """What differs from head to head: a score a token of distance, the first key's weight, and mass that is moved."""

    def edit(self, call: AttentionCall) -> AttentionCall:
        heads, keys = call.query.shape[1], call.key.shape[2]
        bias = torch.zeros(1, heads, keys)
        bias[0, :, 0] = -torch.arange(heads)
        by_head = torch.arange(heads)[:, None] == torch.arange(keys) % heads
        moved = call.with_redistribution(Redistribution(by_head[None], torch.linspace(0, 1, heads)))
        return moved.with_key_bias(bias).with_score_edit(distance_slope(0.1 * torch.arange(1.0, 1 + heads)))


def test_one_heads_map_is_of_its_own_edit(lm: LanguageModel) -> None:
    before, _ = patterns(lm, PROMPT, layer=1)
    with attached(lm, Edit()):
        whole, _ = patterns(lm, PROMPT, layer=1)
        for head, want in enumerate(whole):
            found, _ = head_pattern(lm, PROMPT, 1, head)
            assert np.abs(found - want).max() < 64 * np.finfo(np.float32).eps
            assert np.abs(found - before[head]).max() > 1e-2


def test_layers_of_a_hybrid_without_attention_are_nan_or_refused(lm: LanguageModel) -> None:
    hybrid = tiny_model("qwen3_next")  # layer 0 is linear attention
    mixed = LanguageModel.wrap(hybrid, lm.tokenizer)
    found, tokens = patterns(mixed, PROMPT)
    assert found.shape == (2, 4, len(tokens), len(tokens)) and np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1].sum(-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(head_pattern(mixed, PROMPT, 1, 2)[0], found[1, 2], atol=1e-5)
    for ask in (lambda: patterns(mixed, PROMPT, layer=0), lambda: head_pattern(mixed, PROMPT, 0, 0)):
        with pytest.raises(HeadscopeError, match="layer 0 .* no softmax attention call; these layers do: 1"):
            ask()
