"""Bundled texts, recall, greedy answers."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch

from headscope.interp import HeadscopeError
from headscope.interp.models import LanguageModel
from headscope.interp.prompts import (
    load_haystack,
    load_needles,
    rouge1_recall,
    stop_tokens,
)
from headscope.interventions.tasks.needle import NeedleTask

ALL = load_needles(10)
KINDS = ["byte_bpe", "chat", "sentencepiece", "wordpiece", "slow"]


def test_bundled_texts_keep_their_promises():
    text = load_haystack()
    assert len(text) > 400_000
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if len(s) > 40]
    assert len(set(sentences)) / len(sentences) > 0.999
    function = "a an the in on is what which how who where why to by of for from with and did does do should will s"
    stop = set(function.split())
    for needle in ALL:
        words = set(re.findall(r"\w+", needle.needle.casefold())) - stop
        asked = set(re.findall(r"\w+", needle.paraphrase.casefold())) - stop
        assert not words & asked and {w[:5] for w in words if len(w) > 5}.isdisjoint({w[:5] for w in asked})
        assert needle.real_needle in needle.needle and needle.real_needle not in text
        assert needle.keywords and all(word in needle.real_needle for word in needle.keywords)
        assert any(not re.search(rf"\b{word}", text) for word in needle.keywords)


def test_rouge_recall_by_hand():
    assert rouge1_recall("eat a sandwich", "To EAT, a sandwich!") == 1.0
    assert rouge1_recall("a b a", "a") == pytest.approx(1 / 3)  # counts are clipped
    assert rouge1_recall("eats apples", "eat apple") == 0.0
    assert rouge1_recall("eats apples", "eat apple", stem=lambda word: word.rstrip("s")) == 1.0
    assert rouge1_recall("你好", "好") == 0.5
    with pytest.raises(HeadscopeError, match="no words"):
        rouge1_recall("...", "x")


def _script(lm: LanguageModel, emitted: list[int], length: int) -> None:
    """Make the model emit these tokens after a prompt of ``length`` tokens, whatever it computes."""

    def hook(module, args, kwargs, output):
        step = output.past_key_values.get_seq_length() - length
        if 0 <= step < len(emitted):
            output.logits = torch.nn.functional.one_hot(
                torch.tensor([[emitted[step]]]), output.logits.shape[-1]
            ).float()
        return output

    lm.model.register_forward_hook(hook, with_kwargs=True)


def test_the_task_stops_and_scores(tokenizers, tiny_lm):
    tokenizer = tokenizers["byte_bpe"]
    lm = tiny_lm(tokenizer)
    task = NeedleTask(lengths=[300], depths=[50], needles=1)
    (trial,) = task.trials(lm)
    said = tokenizer(" eat a sandwich and\nsit", add_special_tokens=False)["input_ids"]
    _script(lm, [*said, tokenizer.eos_token_id, *said], 300)
    result = task.run(lm, trial)
    assert result["response"] == "eat a sandwich and\nsit" and result["new_tokens"] == len(said) + 1
    assert result["score"] == pytest.approx(5 / 12) and result["tokens"] == 300
    json.dumps(result)
    lines = NeedleTask(lengths=[300], depths=[50], needles=1, newline_stop=True)
    assert lines.run(lm, trial)["response"] == "eat a sandwich and"
    short = NeedleTask(lengths=[300], depths=[50], needles=1, max_new_tokens=2)
    assert short.run(lm, trial)["new_tokens"] == 2


def test_cached_decoding_is_the_models_own_greedy_answer(tokenizers, tiny_lm):
    lm = tiny_lm(tokenizers["chat"])
    task = NeedleTask(lengths=[300], depths=[50], needles=1, max_new_tokens=12)
    (trial,) = task.trials(lm)
    ids = torch.tensor([task.build(lm, trial).ids])
    assert ids.shape == (1, 300)
    theirs = lm.model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    expected = lm.tokenizer.decode(theirs[0, 300:], skip_special_tokens=True).strip()
    assert task.run(lm, trial)["response"] == expected != ""


def test_stop_tokens_know_turn_ends_and_lists(tokenizers, tiny_lm):
    lm = tiny_lm(tokenizers["chat"])
    tokenizer = tokenizers["chat"]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in stop_tokens(lm)  # not special for this tokenizer
    tokenizer_with = copy.deepcopy(tokenizer)
    tokenizer_with.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    lm = tiny_lm(tokenizer_with)
    lm.model.generation_config.eos_token_id = [7, 8]
    assert stop_tokens(lm) == {7, 8, end, tokenizer_with.eos_token_id}


def test_nan_logits_and_missing_tokenizers_are_named(tokenizers, tiny_lm):
    lm = tiny_lm(tokenizers["byte_bpe"])
    task = NeedleTask(lengths=[300], depths=[50], needles=1)
    (trial,) = task.trials(lm)
    with pytest.raises(HeadscopeError, match="unknown needle 'soup'"):
        task.build(lm, {**trial, "needle": "soup"})
    torch.nn.init.constant_(lm.model.lm_head.weight, float("nan"))
    with pytest.raises(HeadscopeError, match="not numbers"):
        task.run(lm, trial)
    bare = LanguageModel.wrap(lm.model, name="bare")
    with pytest.raises(HeadscopeError, match="without a tokenizer"):
        task.trials(bare)


@pytest.mark.slow
def test_smollm2_answers_a_needle_question(smollm2):
    task = NeedleTask(lengths=[600], depths=[40], needles=1)
    result = task.run(smollm2, task.trials(smollm2)[0])
    assert result["score"] == 1.0 and "Dolores Park" in result["response"] and result["new_tokens"] < 50
