"""Prompts from pieces, and how likely their continuations are, against plain forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.boundary import Boundary, known_boundary
from headscope.interp.prompts.likelihood import answered, likelihoods
from headscope.interp.prompts.pieces import assembled, continuation
from headscope.interp.statistics.spans import named

TEXT = "The old bridge was closed. Nobody knows why the old bridge was closed, and nobody asks. " * 4
PIECES = [(None, "Read."), ("first", " The old bridge.\n"), ("second", "Nobody asks.\n"), (None, "Why?\n")]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A tiny llama with grouped keys that reads bytes and common pieces, after a beginning-of-text token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    inner.train_from_iterator([TEXT], trainer)
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=300, num_hidden_layers=2, initializer_range=0.3, eos_token_id=1, **sizes)
    return LanguageModel.wrap(LlamaForCausalLM(config).eval(), tokenizer, name="tiny", revision="seed 0")


def by_hand(lm: Any, ids: list[int], option: list[int]) -> torch.Tensor:
    """Log-probabilities of an option's tokens from one plain pass in float64 over the whole text."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[*ids, *option]])).logits[0].double().log_softmax(-1)
    return torch.stack([logits[len(ids) - 1 + place, token] for place, token in enumerate(option)])


def test_likelihoods_are_those_of_plain_passes(lm: LanguageModel) -> None:
    prompt = assembled(lm, PIECES, "Answer:")
    options = [continuation(lm, prompt, f" {text}") for text in ("closed", "nobody knows why", "?")]
    assert len({len(option) for option in options}) > 1
    found = likelihoods(lm, prompt.ids, options)
    for option, one in zip(options, found, strict=True):
        expected = by_hand(lm, list(prompt.ids), option)
        assert torch.allclose(one.each, expected, atol=1e-5)
        assert one.total == pytest.approx(float(expected.sum()), abs=1e-4)
    single = likelihoods(lm, prompt.ids, [[5], [9]])
    assert [one.total for one in single] == pytest.approx([float(by_hand(lm, list(prompt.ids), [t])) for t in (5, 9)])


def test_the_greedy_answer_and_its_ranks(lm: LanguageModel) -> None:
    prompt = assembled(lm, PIECES, "Answer:")
    ids, expected = list(prompt.ids), list[int]()
    with torch.no_grad():
        for _ in range(5):
            expected.append(int(lm.model(input_ids=torch.tensor([[*ids, *expected]])).logits[0, -1].argmax()))
    text, count, found = answered(lm, ids, expected, 5)
    assert (count, text) == (5, lm.tokenizer.decode(expected, skip_special_tokens=True).strip())
    assert found.ranks.tolist() == [0] * 5
    with torch.no_grad():
        order = lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argsort(descending=True)
    assert answered(lm, ids, [int(order[7])], 1)[2].ranks.tolist() == [7]


def test_pieces_are_spans_of_their_own_text(lm: LanguageModel) -> None:
    prompt = assembled(lm, PIECES, "Answer:")
    assert prompt.text == "".join(part for _, part in PIECES) + "Answer:"
    assert list(prompt.ids) == lm.tokenizer(prompt.text)["input_ids"] and prompt.ids[0] == 0
    assert lm.tokenizer.decode(prompt.ids[slice(*prompt.spans["first"])]) == PIECES[1][1]
    assert lm.tokenizer.decode(prompt.ids[slice(*prompt.spans["second"])]) == PIECES[2][1]
    assert prompt.spans["first"][1] == prompt.spans["second"][0], "a gap between two documents"
    both = prompt.covering("both", ["first", "second"])
    assert both.spans["both"] == (prompt.spans["first"][0], prompt.spans["second"][1])
    with both.published():
        assert named("both") == both.spans["both"] and known_boundary() == Boundary((len(prompt.ids),))
    assert known_boundary() is None


def test_a_continuation_that_would_change_the_prompt_is_tokenized_alone(lm: LanguageModel) -> None:
    prompt = assembled(lm, [(None, "The old bri")])
    whole = lm.tokenizer("The old bridge")["input_ids"]
    assert whole[: len(prompt.ids)] != list(prompt.ids), "no merge, so the test shows nothing"
    assert continuation(lm, prompt, "dge") == lm.tokenizer("dge", add_special_tokens=False)["input_ids"]
    plain = continuation(lm, prompt, " was")
    assert list(prompt.ids) + plain == lm.tokenizer("The old bri was")["input_ids"]


def test_what_is_no_prompt_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(HeadscopeError, match="'empty' of a prompt became no token"):
        assembled(lm, [("empty", ""), (None, "text")])
    with pytest.raises(HeadscopeError, match="has no chat template: leave chat out"):
        assembled(lm, PIECES, chat=True)
    with pytest.raises(HeadscopeError, match="became no token behind its prompt"):
        continuation(lm, assembled(lm, PIECES), "")
    with pytest.raises(HeadscopeError, match="longer than the context of tiny"):
        assembled(lm, PIECES, room=10**6)


def test_a_chat_has_the_cue_in_the_assistants_turn(lm: LanguageModel) -> None:
    tokenizer = lm.tokenizer.__class__(
        tokenizer_object=lm.tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.chat_template = "{% for m in messages %}U: {{ m['content'] }}\n{% endfor %}A:"
    talking = LanguageModel.wrap(lm.model, tokenizer, name="talking")
    prompt = assembled(talking, PIECES, " Answer:", chat=True)
    words = "".join(part for _, part in PIECES)
    assert prompt.text == f"U: {words}\nA: Answer:"
    assert tokenizer.decode(prompt.ids[slice(*prompt.spans["second"])]) == PIECES[2][1]
