"""Token spans are exact, over several tokenizers and needles."""

from __future__ import annotations

import re

import pytest

from headscope.interp import HeadscopeError
from headscope.interp.prompts import NeedlePrompts, load_haystack, load_needles
from headscope.interp.prompts.spans import find_span, named_spans, text_span

ALL = load_needles(10)
KINDS = ["byte_bpe", "chat", "sentencepiece", "wordpiece", "slow"]


def _plain(text: str) -> str:
    return re.sub(r"\s", "", text.casefold())


@pytest.mark.parametrize("kind", KINDS)
def test_spans_are_exact_at_every_depth(tokenizers, kind, tiny_lm):
    tokenizer = tokenizers[kind]
    lm = tiny_lm(tokenizer)
    task = NeedlePrompts(lengths=[420], depths=[0, 37, 100], needles=10)
    trials = task.trials(lm)
    assert len(trials) == 30
    for trial in trials:
        prompt = task.build(lm, trial)
        answer = _plain(prompt.needle.real_needle)
        first, stop = prompt.span

        def text(a: int, b: int, ids=prompt.ids) -> str:
            return _plain(tokenizer.decode(ids[a:b], clean_up_tokenization_spaces=False))

        assert answer in text(first, stop)
        assert answer not in text(first + 1, stop) and answer not in text(first, stop - 1)  # nothing to spare
        assert prompt.needle_span[0] < first and stop <= prompt.needle_span[1]
        assert list(prompt.ids) == tokenizer(prompt.text, verbose=False)["input_ids"]


def test_needles_that_do_not_survive_tokenization_are_refused(tokenizers, tiny_lm):
    fact = {"needle": "Ключ лежит под 石.", "question": "Where?", "real_needle": "под 石"}
    for kind in ("wordpiece", "slow"):
        with pytest.raises(HeadscopeError, match="does not survive tokenization"):
            NeedlePrompts(lengths=[500], needles=[fact]).trials(tiny_lm(tokenizers[kind]))
    for kind in ("byte_bpe", "sentencepiece"):  # these fall back to bytes
        assert NeedlePrompts(lengths=[500], needles=[fact], depths=[50]).trials(tiny_lm(tokenizers[kind]))


def test_truncation_is_an_error(tokenizers):
    tokenizer = tokenizers["byte_bpe"]
    text = load_haystack()[:500] + " The vault opens at noon."
    first, stop = text_span(tokenizer, text, "at noon")
    assert text_span(tokenizer, text, "at noon", limit=stop) == (first, stop)
    with pytest.raises(HeadscopeError, match=f"the text is cut at {stop - 1}"):
        text_span(tokenizer, text, "at noon", limit=stop - 1)
    with pytest.raises(HeadscopeError, match="does not occur"):
        text_span(tokenizer, text, "at midnight")


def test_named_spans_and_repeated_parts(tokenizers):
    tokenizer = tokenizers["byte_bpe"]
    text = "one two one three"
    spans = named_spans(tokenizer, text, {"first": "one", "last": "three"})
    ids = tokenizer(text)["input_ids"]
    assert spans["first"][0] == 0 and spans["last"][1] == len(ids)
    later = text_span(tokenizer, text, "one", start=1)
    assert tokenizer.decode(ids[slice(*later)]) == " one"


def test_find_span_is_exact():
    ids = [5, 1, 2, 3, 1, 2, 4]
    assert find_span(ids, [1, 2, 4]) == (4, 7)  # 2 of 3 ids agree at 1 already
    assert find_span(ids, [1, 2], start=2) == (4, 6)
    with pytest.raises(HeadscopeError, match="do not occur"):
        find_span(ids, [2, 1])
    with pytest.raises(HeadscopeError, match="empty"):
        find_span(ids, [])
