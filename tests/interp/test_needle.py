"""Spans, needles, prompts of an exact length, and greedy answers."""

from __future__ import annotations

import json
import re
import types

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer, PreTrainedTokenizerFast

from headscope.interp import HeadscopeError
from headscope.interp.models import LanguageModel
from headscope.interp.needle import (
    NeedleTask,
    load_haystack,
    load_needles,
    rouge1_recall,
    run_needle_trial,
    stop_tokens,
)
from headscope.interp.needle.text import boundary_before, insertion_point, sentence_ends
from headscope.interp.spans import find_span, named_spans, text_span

ALL = load_needles(10)
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class SlowWords(PreTrainedTokenizer):
    """A tokenizer in Python, without offsets: words and punctuation, a space belongs to the word after it."""

    def __init__(self, words: list[str], **kwargs) -> None:
        self._words = ["<unk>", "<eos>", *words]
        self._ids = {word: i for i, word in enumerate(self._words)}
        super().__init__(unk_token="<unk>", eos_token="<eos>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return re.findall(r" ?\w+|[^\w ]| ", text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self._words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def _corpus() -> str:
    lines = [" ".join([n.needle, n.question, n.paraphrase or ""]) for n in ALL]
    return load_haystack()[:20_000] + "\n".join(lines) + "\n<book></book>Based on the content of the book, Question:"


def _byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["<eos>", "<|end|>"])
    tokenizer.train_from_iterator([_corpus()], trainer)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    special = ["<unk>", "<eos>", "<|end|>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator([_corpus()], trainers.BpeTrainer(vocab_size=900, special_tokens=special))
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=["<unk>", "<eos>", "<|end|>"])
    tokenizer.train_from_iterator([_corpus()], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers():
    def fast(tokenizer: Tokenizer, **kwargs) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **kwargs)

    words = sorted(set(re.findall(r" ?\w+|[^\w ]| ", _corpus() + load_haystack()))) + [" Answer", "Answer"]
    return {
        "byte_bpe": fast(_byte_bpe()),
        "chat": fast(_byte_bpe(), chat_template=CHAT),
        "sentencepiece": fast(_sentencepiece(), unk_token="<unk>"),
        "wordpiece": fast(_wordpiece(), unk_token="<unk>"),
        "slow": SlowWords(words),
    }


KINDS = ["byte_bpe", "chat", "sentencepiece", "wordpiece", "slow"]


def _lm(tokenizer, context: int = 4096) -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), 16),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LanguageModel.wrap(LlamaForCausalLM(config).eval(), tokenizer, name="tiny")


def _plain(text: str) -> str:
    return re.sub(r"\s", "", text.casefold())


@pytest.mark.parametrize("kind", KINDS)
def test_spans_are_exact_at_every_depth(tokenizers, kind):
    tokenizer = tokenizers[kind]
    lm = _lm(tokenizer)
    task = NeedleTask(lengths=[420], depths=[0, 37, 100], needles=10)
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


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_the_asked_length_and_depths_are_different_places(tokenizers, kind):
    lm = _lm(tokenizers[kind])
    task = NeedleTask(lengths=[1501], depths=10, needles=2)
    for name in task.loaded:
        prompts = [task.build(lm, t) for t in task.trials(lm) if t["needle"] == name]
        assert [len(p.ids) for p in prompts] == [1501] * 10
        places = [p.needle_span[0] for p in prompts]
        assert places == sorted(set(places))  # one vocabulary's period ids would put every depth at 0
        around = 1501 - (prompts[0].needle_span[1] - prompts[0].needle_span[0])
        off = np.array(places[1:-1]) / around - np.array(task.percents[1:-1]) / 100
        assert off.max() < 0.06 and off.min() > -0.25  # one sentence of Austen's to the left, and the question


def test_needle_stands_between_sentences(tokenizers):
    lm = _lm(tokenizers["byte_bpe"])
    task = NeedleTask(lengths=[1500], depths=[0, 22, 56, 100], needles=1)
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


def test_needle_follows_a_sentence_of_the_users_text(tokenizers, tmp_path):
    lm, book = _lm(tokenizers["byte_bpe"]), tmp_path / "book.txt"
    book.write_text(" ".join(f"Mr. Elliot, who was {i}, sold {i / 4} acres." for i in range(300)))
    task = NeedleTask(lengths=[800], depths=[20, 40, 60, 80], needles=1, haystack=book)
    for trial in task.trials(lm):
        before, after = task.build(lm, trial).text.split("\n" + task.loaded["sandwich"].needle + "\n")
        assert before.endswith("acres.") and after.startswith("Mr. Elliot")


def test_long_sentences_are_entered_at_a_clause():
    text = "a, " * 30 + "b. " + "word " * 30 + "end; " + "word " * 40
    assert text[: insertion_point(text, text.index("b.") + 6)].endswith("b.")
    assert text[: insertion_point(text, len(text) - 1)].endswith("end;")


def test_chat_template_and_base_prompt(tokenizers):
    task = NeedleTask(lengths=[500], depths=[50], needles=1)
    chat, base = _lm(tokenizers["chat"]), _lm(tokenizers["byte_bpe"])
    trial = task.trials(chat)[0]
    text = task.build(chat, trial).text
    assert text.startswith("<|user|><book>") and text.endswith("Answer:<|end|>\n<|assistant|>")
    assert task.build(base, trial).text.endswith(
        "\nBased on the content of the book, Question: What is the best thing to do in San Francisco?\nAnswer:"
    )
    forced = NeedleTask(lengths=[500], depths=[50], needles=1, chat=False)
    assert "<|user|>" not in forced.build(chat, trial).text
    with pytest.raises(HeadscopeError, match="no chat template"):
        NeedleTask(lengths=[500], depths=[50], chat=True).trials(base)


def test_needles_read_different_parts_of_the_haystack(tokenizers):
    lm = _lm(tokenizers["byte_bpe"])
    task = NeedleTask(lengths=[600], depths=[100], needles=3)
    begins = [task.build(lm, trial).text[:80] for trial in task.trials(lm)]
    assert len(set(begins)) == 3 and begins[0].startswith("Sir Walter Elliot")


def test_any_text_file_and_own_needles(tokenizers, tmp_path):
    lm = _lm(tokenizers["byte_bpe"])
    book, facts = tmp_path / "book.txt", tmp_path / "facts.jsonl"
    book.write_text("The sea was calm. A gull cried! Who had heard it? Mr. Elliot slept on.\n", encoding="utf-8")
    fact = {"needle": "The vault opens at noon.", "question": "When does it open?", "real_needle": "At Noon"}
    facts.write_text(json.dumps(fact) + "\n\n")
    task = NeedleTask(lengths=[300], depths=3, needles=facts, haystack=book)
    (first, *_) = trials = task.trials(lm)
    assert [t["depth"] for t in trials] == [0, 50, 100] and first["needle"] == "At Noon"
    prompt = task.build(lm, trials[1])
    assert len(prompt.ids) == 300 and prompt.needle.real_needle == "at noon"  # as it stands in the needle
    assert tokenizers["byte_bpe"].decode(prompt.ids[slice(*prompt.span)]) == " at noon"
    assert task.parameters["haystack"] == "book.txt" and str(tmp_path) not in json.dumps(task.parameters)


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
def test_what_cannot_be_asked_is_refused(tokenizers, settings, message):
    with pytest.raises(HeadscopeError, match=message):
        NeedleTask(**settings).trials(_lm(tokenizers["byte_bpe"]))


def test_papers_lengths_are_clipped_to_the_context(tokenizers):
    lengths = NeedleTask().lengths_for(_lm(tokenizers["byte_bpe"], context=8192))
    assert lengths == [1000, 3579, 6158]
    assert len(NeedleTask().lengths_for(_lm(tokenizers["byte_bpe"], context=131072))) == 20
    with pytest.raises(HeadscopeError, match="shorter than the paper's shortest"):
        NeedleTask().lengths_for(_lm(tokenizers["byte_bpe"], context=1024))


def test_needles_that_do_not_survive_tokenization_are_refused(tokenizers):
    fact = {"needle": "Ключ лежит под 石.", "question": "Where?", "real_needle": "под 石"}
    for kind in ("wordpiece", "slow"):
        with pytest.raises(HeadscopeError, match="does not survive tokenization"):
            NeedleTask(lengths=[500], needles=[fact]).trials(_lm(tokenizers[kind]))
    for kind in ("byte_bpe", "sentencepiece"):  # these fall back to bytes
        assert NeedleTask(lengths=[500], needles=[fact], depths=[50]).trials(_lm(tokenizers[kind]))


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


def test_sentence_ends():
    text = 'Mr. Elliot came. "Ay!" she said; e.g. now? 3.5 miles.'
    assert [text[:end] for end in sentence_ends(text)] == [text[:16], text[:22], text[:42], text]
    assert sentence_ends("no stop\nat all") == [7]
    assert sentence_ends("只有。中文") == [3]
    assert [boundary_before([4, 9], at) for at in (3, 4, 8, 9, 50)] == [4, 4, 4, 9, 9]


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


def test_run_needle_trial_stops_and_scores(tokenizers):
    tokenizer = tokenizers["byte_bpe"]
    lm = _lm(tokenizer)
    task = NeedleTask(lengths=[300], depths=[50], needles=1)
    (trial,) = task.trials(lm)
    said = tokenizer(" eat a sandwich and\nsit", add_special_tokens=False)["input_ids"]
    _script(lm, [*said, tokenizer.eos_token_id, *said], 300)
    result = run_needle_trial(lm, trial, task)
    assert result["response"] == "eat a sandwich and\nsit" and result["new_tokens"] == len(said) + 1
    assert result["score"] == pytest.approx(5 / 12) and result["tokens"] == 300
    json.dumps(result)
    lines = NeedleTask(lengths=[300], depths=[50], needles=1, newline_stop=True)
    assert run_needle_trial(lm, trial, lines)["response"] == "eat a sandwich and"
    short = NeedleTask(lengths=[300], depths=[50], needles=1, max_new_tokens=2)
    assert run_needle_trial(lm, trial, short)["new_tokens"] == 2


def test_cached_decoding_is_the_models_own_greedy_answer(tokenizers):
    lm = _lm(tokenizers["chat"])
    task = NeedleTask(lengths=[300], depths=[50], needles=1, max_new_tokens=12)
    (trial,) = task.trials(lm)
    ids = torch.tensor([task.build(lm, trial).ids])
    assert ids.shape == (1, 300)
    theirs = lm.model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    expected = lm.tokenizer.decode(theirs[0, 300:], skip_special_tokens=True).strip()
    assert run_needle_trial(lm, trial, task)["response"] == expected != ""


def test_decoding_context_is_entered_after_the_prompt(tokenizers):
    lm = _lm(tokenizers["byte_bpe"])
    seen: list[int] = []

    class Probe:
        def __enter__(self):
            self.hook = lm.model.register_forward_pre_hook(
                lambda m, a, kw: seen.append(kw["input_ids"].shape[1]), with_kwargs=True
            )

        def __exit__(self, *error):
            self.hook.remove()

    task = NeedleTask(lengths=[300], depths=[50], needles=1, max_new_tokens=3)
    run_needle_trial(lm, task.trials(lm)[0], task, decoding=Probe())
    assert seen == [1, 1, 1]


def test_stop_tokens_know_turn_ends_and_lists(tokenizers):
    lm = _lm(tokenizers["chat"])
    tokenizer = tokenizers["chat"]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in stop_tokens(lm)  # not special for this tokenizer
    tokenizer_with = PreTrainedTokenizerFast(
        tokenizer_object=_byte_bpe(), eos_token="<eos>", chat_template=CHAT, extra_special_tokens=["<|end|>"]
    )
    lm = _lm(tokenizer_with)
    lm.model.generation_config.eos_token_id = [7, 8]
    assert stop_tokens(lm) == {7, 8, end, tokenizer_with.eos_token_id}


def test_nan_logits_and_missing_tokenizers_are_named(tokenizers):
    lm = _lm(tokenizers["byte_bpe"])
    task = NeedleTask(lengths=[300], depths=[50], needles=1)
    (trial,) = task.trials(lm)
    with pytest.raises(HeadscopeError, match="unknown needle 'soup'"):
        task.build(lm, {**trial, "needle": "soup"})
    torch.nn.init.constant_(lm.model.lm_head.weight, float("nan"))
    with pytest.raises(HeadscopeError, match="not numbers"):
        run_needle_trial(lm, trial, task)
    bare = types.SimpleNamespace(name="bare", tokenizer=None, info=lm.info)
    with pytest.raises(HeadscopeError, match="without a tokenizer"):
        task.trials(bare)


@pytest.mark.slow
def test_smollm2_answers_a_needle_question(smollm2):
    task = NeedleTask(lengths=[600], depths=[40], needles=1)
    result = run_needle_trial(smollm2, task.trials(smollm2)[0], task)
    assert result["score"] == 1.0 and "Dolores Park" in result["response"] and result["new_tokens"] < 50
