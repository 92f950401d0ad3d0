"""Prompts of an exact length with the needle where it was asked for."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from headscope.interp import HeadscopeError
from headscope.interp.prompts import NeedlePrompts, load_haystack, load_needles
from headscope.interp.prompts.haystack import boundary_before, insertion_point, sentence_ends

ALL = load_needles(10)
KINDS = ["byte_bpe", "chat", "sentencepiece", "wordpiece", "slow"]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_the_asked_length_and_depths_are_different_places(tokenizers, kind, tiny_lm):
    lm = tiny_lm(tokenizers[kind])
    task = NeedlePrompts(lengths=[1501], depths=10, needles=2)
    for name in task.loaded:
        prompts = [task.build(lm, t) for t in task.trials(lm) if t["needle"] == name]
        assert [len(p.ids) for p in prompts] == [1501] * 10
        places = [p.needle_span[0] for p in prompts]
        assert places == sorted(set(places))  # one vocabulary's period ids would put every depth at 0
        around = 1501 - (prompts[0].needle_span[1] - prompts[0].needle_span[0])
        off = np.array(places[1:-1]) / around - np.array(task.percents[1:-1]) / 100
        assert off.max() < 0.06 and off.min() > -0.25  # one sentence of Austen's to the left, and the question


def test_needle_stands_between_sentences(tokenizers, tiny_lm):
    lm = tiny_lm(tokenizers["byte_bpe"])
    task = NeedlePrompts(lengths=[1500], depths=[0, 22, 56, 100], needles=1)
    start, *inner, end = [task.build(lm, trial) for trial in task.trials(lm)]
    sentence = task.loaded["sandwich"].needle
    assert start.text.startswith(sentence + "\n")
    assert all(p.text.split("\n" + sentence + "\n")[0].rstrip("\"'")[-1] in ".!?;:,-" for p in inner)
    assert end.text.split("\n" + sentence + "\n")[1].startswith("Based on the content of the book, Question: What is")
    whole = re.sub(r"\s+", "", inner[0].text.replace(sentence, ""))
    assert (
        whole.removesuffix(re.sub(r"\s+", "", end.text.split(sentence)[1]))[:2000]
        == re.sub(r"\s+", "", load_haystack())[:2000]
    )  # nothing of the haystack is lost around the needle


def test_needle_follows_a_sentence_of_the_users_text(tokenizers, tmp_path, tiny_lm):
    lm, book = tiny_lm(tokenizers["byte_bpe"]), tmp_path / "book.txt"
    book.write_text(" ".join(f"Mr. Elliot, who was {i}, sold {i / 4} acres." for i in range(300)))
    task = NeedlePrompts(lengths=[800], depths=[20, 40, 60, 80], needles=1, haystack=book)
    for trial in task.trials(lm):
        before, after = task.build(lm, trial).text.split("\n" + task.loaded["sandwich"].needle + "\n")
        assert before.endswith("acres.") and after.startswith("Mr. Elliot")


def test_long_sentences_are_entered_at_a_clause():
    text = "a, " * 30 + "b. " + "word " * 30 + "end; " + "word " * 40
    assert text[: insertion_point(text, text.index("b.") + 6)].endswith("b.")
    assert text[: insertion_point(text, len(text) - 1)].endswith("end;")


def test_chat_template_and_base_prompt(tokenizers, tiny_lm):
    task = NeedlePrompts(lengths=[500], depths=[50], needles=1)
    chat, base = tiny_lm(tokenizers["chat"]), tiny_lm(tokenizers["byte_bpe"])
    trial = task.trials(chat)[0]
    text = task.build(chat, trial).text
    assert text.startswith("<|user|><book>") and text.endswith("Answer:<|end|>\n<|assistant|>")
    assert task.build(base, trial).text.endswith(
        "\nBased on the content of the book, Question: What is the best thing to do in San Francisco?\nAnswer:"
    )
    forced = NeedlePrompts(lengths=[500], depths=[50], needles=1, chat=False)
    assert "<|user|>" not in forced.build(chat, trial).text
    with pytest.raises(HeadscopeError, match="no chat template"):
        NeedlePrompts(lengths=[500], depths=[50], chat=True).trials(base)


def test_needles_read_different_parts_of_the_haystack(tokenizers, tiny_lm):
    lm = tiny_lm(tokenizers["byte_bpe"])
    task = NeedlePrompts(lengths=[600], depths=[100], needles=3)
    begins = [task.build(lm, trial).text[:80] for trial in task.trials(lm)]
    assert len(set(begins)) == 3 and begins[0].startswith("Sir Walter Elliot")


def test_beyond_the_context_where_that_is_meant(tokenizers, tiny_lm):
    lm = tiny_lm(tokenizers["byte_bpe"])
    task = NeedlePrompts(lengths=[lm.info.context_length + 100], depths=[50], needles=1, beyond=True)
    (trial,) = task.trials(lm)
    assert len(task.build(lm, trial).ids) == lm.info.context_length + 100


def test_any_text_file_and_own_needles(tokenizers, tmp_path, tiny_lm):
    lm = tiny_lm(tokenizers["byte_bpe"])
    book, facts = tmp_path / "book.txt", tmp_path / "facts.jsonl"
    book.write_text("The sea was calm. A gull cried! Who had heard it? Mr. Elliot slept on.\n", encoding="utf-8")
    fact = {"needle": "The vault opens at noon.", "question": "When does it open?", "real_needle": "At Noon"}
    facts.write_text(json.dumps(fact) + "\n\n")
    task = NeedlePrompts(lengths=[300], depths=3, needles=facts, haystack=book)
    (first, *_) = trials = task.trials(lm)
    assert [t["depth"] for t in trials] == [0, 50, 100] and first["needle"] == "At Noon"
    prompt = task.build(lm, trials[1])
    assert len(prompt.ids) == 300 and prompt.needle.real_needle == "at noon"  # as it stands in the needle
    assert tokenizers["byte_bpe"].decode(prompt.ids[slice(*prompt.span)]) == " at noon"
    assert task.parameters(lm)["haystack"] == "book.txt" and str(tmp_path) not in json.dumps(task.parameters(lm))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": [4096]}, "ask for lengths up to 4046"),
        ({"lengths": [90]}, "is too short"),
        ({"lengths": []}, "at least one"),
        ({"lengths": [500], "depths": [0, 101]}, "0 to 100"),
        ({"lengths": [500], "depths": 0}, "0 to 100"),
        ({"lengths": [500], "needles": 11}, "10 bundled needles"),
        ({"lengths": [500], "needles": []}, "no needle"),
        ({"lengths": [500], "needles": [ALL[0], ALL[0]]}, "two needles are called 'sandwich'"),
        ({"lengths": [500], "haystack": "/nowhere.txt"}, "cannot read"),
        ({"lengths": [500], "needles": [{"needle": "a b", "question": "c?", "real_needle": "d"}]}, "not a part"),
        ({"lengths": [500], "needles": [{"needle": "a b", "question": "c?"}]}, "real_needle is missing"),
        (
            {
                "lengths": [500],
                "needles": [{"needle": "Sir Walter Elliot slept", "question": "q?", "real_needle": "Sir Walter"}],
            },
            "already tells",
        ),
        (
            {
                "lengths": [500],
                "paraphrased": True,
                "needles": [{"needle": "It is 7 zloty.", "question": "q?", "real_needle": "7 zloty"}],
            },
            "no paraphrase",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(tokenizers, settings, message, tiny_lm):
    with pytest.raises(HeadscopeError, match=message):
        NeedlePrompts(**settings).trials(tiny_lm(tokenizers["byte_bpe"]))


def test_papers_lengths_are_clipped_to_the_context(tokenizers, tiny_lm):
    lengths = NeedlePrompts().lengths_for(tiny_lm(tokenizers["byte_bpe"], context=8192))
    assert lengths == [1000, 3579, 6158]
    assert len(NeedlePrompts().lengths_for(tiny_lm(tokenizers["byte_bpe"], context=131072))) == 20
    with pytest.raises(HeadscopeError, match="shorter than the shortest usual"):
        NeedlePrompts().lengths_for(tiny_lm(tokenizers["byte_bpe"], context=1024))


def test_sentence_ends():
    text = 'Mr. Elliot came. "Ay!" she said; e.g. now? 3.5 miles.'
    assert [text[:end] for end in sentence_ends(text)] == [text[:16], text[:22], text[:42], text]
    assert sentence_ends("no stop\nat all") == [7]
    assert sentence_ends("只有。中文") == [3]
    assert [boundary_before([4, 9], at) for at in (3, 4, 8, 9, 50)] == [4, 4, 4, 9, 9]
