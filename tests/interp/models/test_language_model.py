"""Prompts in, logits and texts out."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "opt"])
def test_padding_changes_nothing(name, tiny, words, vocabulary):
    lm = load_model(tiny(name), tokenizer=words())
    assert lm.tokenizer.pad_token == "</s>" and len(lm.tokenizer) == len(vocabulary)
    prompts = ["a b c d e f", "x y"]
    batch = lm(prompts).logits
    for row, prompt in enumerate(prompts):
        alone = lm(prompt).logits[0]
        torch.testing.assert_close(batch[row, : len(alone)], alone)
    texts = lm.generate(prompts, max_new_tokens=4)
    assert texts == [lm.generate(prompt, max_new_tokens=4)[0] for prompt in prompts]


def test_forward_keeps_no_gradient_and_passes_options(lm, vocabulary):
    output = lm("a b c", output_hidden_states=True, logits_to_keep=1)
    assert not output.logits.requires_grad
    assert output.logits.shape == (1, 1, len(vocabulary)) and len(output.hidden_states) == 3
    assert lm.encode("a b c")["input_ids"].tolist() == [[0, 6, 7, 8]]


@pytest.mark.parametrize(
    ("prompts", "part"),
    [("", "prompt 0 is empty"), (["a", ""], "prompt 1 is empty"), ([], "no prompt"), ([3], "int, not text")],
)
def test_empty_prompts(lm, prompts, part, says):
    for call in (lm, lm.generate):
        with pytest.raises(HeadscopeError) as error:
            call(prompts)
        says(error, part)


NO_PROMPTS = [
    (None, "NoneType is no prompt: give a string"),
    (5, "int is no prompt: give a string"),
    (b"a b", "bytes is no prompt: give a string"),
    ([1, 2], r"for token ids \(batch, length\) call lm.forward"),
    ([b"a"], "prompt 0 is bytes, not text"),
    (["a", None], "prompt 1 is NoneType, not text"),
    ([["a"]], "prompt 0 is list, not text"),
    ((), "no prompt was given"),
    (torch.ones(1, 2, dtype=torch.long), r"call lm.forward\(ids\) or lm.model\(input_ids=ids\)"),
    (np.array([[1, 2]]), r"call lm.forward\(ids\) or lm.model\(input_ids=ids\)"),
    ({"input_ids": [1]}, r"call lm.model\(\*\*inputs\)"),
]


@pytest.mark.parametrize(("prompts", "why"), NO_PROMPTS, ids=lambda x: repr(x)[:20])
@pytest.mark.parametrize("call", ["__call__", "generate", "encode"])
def test_what_is_no_prompt_gets_one_line(lm, call, prompts, why):
    with pytest.raises(HeadscopeError, match=why) as error:
        getattr(lm, call)(prompts)
    assert "\n" not in str(error.value)


def test_token_ids_run_as_the_line_says(lm):
    ids = lm.encode("a b c")["input_ids"]
    wanted = lm("a b c").logits
    assert torch.equal(lm.forward(ids).logits, wanted) and torch.equal(lm.model(input_ids=ids).logits, wanted)
    assert torch.equal(lm(np.array(["a b c"])).logits, wanted) and torch.equal(lm(x for x in ["a b c"]).logits, wanted)


def test_prompt_without_tokens(tiny, words, says):
    tokenizer = words()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(HeadscopeError) as error:
        load_model(tiny(), tokenizer=tokenizer)(["a", " "])
    says(error, "prompt 1 has no tokens")


def test_prompt_longer_than_the_context(lm, says):
    lm("a " * 15)
    with pytest.raises(HeadscopeError) as error:
        lm(["a", "a " * 16])
    says(error, "prompt 1 has 17 tokens", "context", "(16)")
    with pytest.raises(HeadscopeError) as error:
        lm.generate("a " * 12, max_new_tokens=4)
    says(error, "13 tokens and 4 new ones")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_that_are_not_numbers(dtype, tiny, words, says):
    lm = load_model(tiny().to(getattr(torch, dtype)), tokenizer=words())
    with torch.no_grad():
        lm.model.model.norm.weight[0] = torch.nan
    for call in (lm, partial(lm.generate, max_new_tokens=2)):
        with pytest.raises(HeadscopeError) as error:
            call(["a b", "c"])
        says(error, f"not numbers in {dtype}", "weights" if dtype == "float32" else "dtype='float32'")


def test_forbidden_tokens_are_not_an_error(lm):
    lm.model.lm_head.register_forward_hook(lambda m, args, out: out.index_fill(-1, torch.tensor([3]), -torch.inf))
    assert lm("a b").logits[0, -1, 3] == -torch.inf


def test_chat(tiny, words, says):
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"
    lm = load_model(tiny(), tokenizer=words(chat_template=template))
    assert lm.chat("a b") == "user : a b assistant :"  # the tokenizer adds <s> by itself
    assert lm.encode(lm.chat("a b"))["input_ids"].tolist() == [[0, 3, 5, 6, 7, 4, 5]]
    with pytest.raises(HeadscopeError) as error:
        load_model(tiny(), tokenizer=words()).chat("a")
    says(error, "no chat template")
