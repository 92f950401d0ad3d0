"""QRHead and receiver heads: by hand, and against dense eager weights in float64 of the untouched model.

Tolerance: calibrated scores and sentence means are sums and means of up to 500 float32 softmax weights, each good to
1e-5 (see ``test_heads``) and of sum at most 1: 1e-5. Kurtosis divides by a variance squared: its relative error is some
ten times that of the deviations, which are a hundredth of the means here: 1e-2.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.interp import heads, load_model
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.recall.qrhead import QRHead, document_score
from headscope.interp.heads.recall.receiver import Receiver, sentences, vertical_scores
from headscope.interp.models import LanguageModel
from headscope.interp.prompts import load_haystack, load_needles
from headscope.interp.prompts.documents import LATE, Question, document_prompt, load_questions
from headscope.interp.prompts.spans import encode

TOLERANCE = 1e-5
QUESTIONS = [
    Question("Who rang the bell?", ("The cook made soup.", "The keeper rang the bell at noon.", "It rained."), (1,)),
    Question("What did the cook make today?", ("The cook made soup.", "The sun set.", "Soup was hot."), (0, 2)),
]


@pytest.fixture(scope="module")
def lm(byte_level) -> LanguageModel:
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    common = dict(vocab_size=700, eos_token_id=0, bos_token_id=None, initializer_range=0.3)
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, max_position_embeddings=1024, **sizes, **common)
    tokenizer = byte_level(700)
    return load_model(LlamaForCausalLM(config).eval(), tokenizer=tokenizer)


def eager(lm: LanguageModel, ids) -> np.ndarray:
    """(layer, head, query, key) of one sequence."""
    model = copy.deepcopy(lm.model).double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.cat(model(torch.tensor([list(ids)]), output_attentions=True).attentions).numpy()


def test_the_prompt_is_the_authors(lm: LanguageModel) -> None:
    prompt = document_prompt(lm, ["one thing", "Title\nother thing"], "what?")
    text = lm.tokenizer.decode(prompt.ids)
    late = "Please find information that are relevant to the following query in the paragraphs above."
    start = " Here are some paragraphs: \n\n[1] one thing \n\n[2] Title\nother thing \n\n"
    assert text == f"{start}{late} \n\nQuery: what?" and late == LATE
    assert [lm.tokenizer.decode(prompt.ids[slice(*span)]) for span in prompt.documents] == [
        "[1] one thing",
        "[2] Title\nother thing",
    ]
    assert lm.tokenizer.decode(prompt.ids[slice(*prompt.query)]).startswith("Please find")
    assert prompt.query[1] == len(prompt.ids)
    chat = copy.copy(lm)
    chat.tokenizer = copy.deepcopy(lm.tokenizer)
    chat.tokenizer.chat_template = "<u>{{ messages[0]['content'] }}</u>go:"
    whole = document_prompt(chat, ["one thing"], "what?")
    shown = f"<u> Here are some paragraphs: \n\n[1] one thing \n\n{late} \n\nQuery: what?</u>go:"
    assert lm.tokenizer.decode(whole.ids) == shown
    assert whole.query[1] == len(whole.ids)  # with what the template writes after the query


@pytest.mark.parametrize("batch", [1, 2])
def test_qrhead_is_its_formula_on_eager_weights(lm: LanguageModel, batch: int) -> None:
    scores = heads.qrhead(lm, questions=QUESTIONS, batch=batch, progress=False)
    for i, one in enumerate(QUESTIONS):
        asked, null = (document_prompt(lm, one.documents, query) for query in (one.question, "N/A"))
        s = [eager(lm, p.ids)[..., p.query[0] :, :].mean(-2) for p in (asked, null)]
        least = min(x.shape[-1] for x in s)
        calibrated = s[0][..., :least] - s[1][..., :least]
        total = 0.0
        for gold in one.gold:
            own = calibrated[..., slice(*asked.documents[gold])]
            floor = own.mean(-1, keepdims=True) - 2 * own.std(-1, ddof=1, keepdims=True)
            total = total + (own * (own > floor)).sum(-1)
        np.testing.assert_allclose(scores.trials[i], total, rtol=0, atol=TOLERANCE)
    assert abs(scores.trials).max() > 100 * TOLERANCE


def test_outliers_at_the_bottom_of_a_document_are_left_out() -> None:
    tokens = np.array([[1.0] * 9 + [-8.0], [1.0] * 9 + [0.9]])
    # mean 0.1, std sqrt(9 * 0.9^2 + 8.1^2) / 3 = 2.846: -8 is below 0.1 - 5.69; 0.9 of the other is below 0.9267
    assert document_score(tokens).tolist() == [9.0, 9.0]
    assert document_score(np.array([[3.0, 1.0]])).tolist() == [4.0]


def test_questions_in_the_authors_form(lm: LanguageModel, tmp_path: Path) -> None:
    paragraphs = [{"idx": "a", "paragraph_text": " text of a "}, {"idx": "b", "paragraph_text": "b's", "title": "Bee"}]
    held = [{"idx": "q", "question": "who?", "paragraphs": paragraphs, "gt_docs": ["b"]}]
    (path := tmp_path / "q.json").write_text(json.dumps(held))
    assert load_questions(path) == [Question("who?", ("text of a", "Bee\nb's"), (1,))]
    scores = heads.qrhead(lm, questions=str(path), progress=False)
    assert scores.mean.shape == (2, 4) and scores.details[0]["gold"] == [1]
    held[0]["gt_docs"] = ["c"]
    path.write_text(json.dumps(held))
    with pytest.raises(HeadscopeError, match="holds no questions"):
        load_questions(path)
    empty = heads.qrhead(lm, questions=[Question("q", ("a text", "other"), ())], progress=False)
    assert (empty.mean == 0).all()  # as the authors count a question without gold documents
    with pytest.raises(HeadscopeError, match="at least one question"):
        heads.qrhead(lm, questions=[], progress=False)


def test_bundled_questions_hold_their_answer_once(lm: LanguageModel) -> None:
    for sample in QRHead(samples=4, documents=3, length=40).prepare(lm):
        trial = sample.trial
        texts = [lm.tokenizer.decode(sample.ids[slice(*span)]) for span in trial["documents"]]
        needle = next(n.needle for n in load_needles(4) if n.question == trial["question"])
        assert [i for i, text in enumerate(texts) if needle in text] == trial["gold"]


def receiver_by_hand(p: np.ndarray, spans: list, proximity: int, depth: bool) -> np.ndarray:
    """Kurtosis (layer, head) of vertical scores, from a pattern (layer, head, query, key)."""
    n = len(spans)
    between = np.full((*p.shape[:2], n, n), np.nan)
    for i, (r0, r1) in enumerate(spans):
        for j, (c0, c1) in enumerate(spans[: max(0, i - proximity + 1)]):
            between[..., i, j] = p[..., r0:r1, c0:c1].mean((-1, -2))
    if depth:
        counted = (~np.isnan(between)).sum(-1, keepdims=True)
        between = stats.rankdata(between, axis=-1, nan_policy="omit") / np.maximum(counted, 1)
    return stats.kurtosis(np.nanmean(between[..., : n - proximity], axis=-2), axis=-1, fisher=True, bias=True)


@pytest.mark.parametrize("depth", [False, True])
def test_receiver_is_its_formula_on_eager_weights(lm: LanguageModel, depth: bool) -> None:
    texts = [load_haystack()[30_000:32_500], load_haystack()[60_000:62_200]]
    scores = heads.receiver(lm, texts=texts, length=900, proximity=2, control_depth=depth, progress=False)
    for i, text in enumerate(texts):
        ids, offsets = encode(lm.tokenizer, text)
        spans = sentences(text, offsets[:900])
        expected = receiver_by_hand(eager(lm, ids[:900]), spans, 2, depth)
        # float32 patterns move a sentence's score by 1e-6 of itself, and their kurtosis by some ten times that
        np.testing.assert_allclose(scores.trials[i], expected, rtol=0, atol=1e-4)
        assert scores.details[i]["sentences"] == len(spans) > 6


def test_vertical_scores_and_kurtosis_by_hand() -> None:
    """Six sentences, proximity 2: sentence 1 is read by 3, 4, 5 with 0.3 each, all others with 0.1."""
    m = np.full((6, 6), 0.1)
    m[3:, 1] = 0.3
    m[2, 1], m[1, 1], m[0, 5] = 9.0, 9.0, 9.0  # too near, itself, ahead: not counted
    assert vertical_scores(m, 2)[:4] == pytest.approx([0.1, 0.3, 0.1, 0.1])
    assert np.isnan(vertical_scores(m, 2)[4:]).all()
    # of (0.1, 0.3, 0.1, 0.1): deviations -1, 3, -1, -1 (times 0.05): fourth moment 21 over second 3 squared, less 3
    assert stats.kurtosis(vertical_scores(m, 2)[:4]) == pytest.approx(21 / 9 - 3)
    ranks = vertical_scores(m, 2, control_depth=True)  # rows 2, 3, 4, 5 have 1, 2, 3, 4 counted entries
    assert ranks[1] == 1.0 and ranks[3] == pytest.approx(2 / 4)


def test_sentences_are_whole_and_part_the_text(lm: LanguageModel) -> None:
    text = "He came. She saw! Mr. Green won? And the rest is cut of"
    ids, offsets = encode(lm.tokenizer, text)
    found = [lm.tokenizer.decode(ids[slice(*span)]) for span in sentences(text, offsets)]
    assert found == ["He came.", " She saw!", " Mr. Green won?"]
    assert len(sentences(text, offsets[: len(offsets) // 3])) < 3
    with pytest.raises(HeadscopeError, match="3 whole sentences .* needs 7"):
        heads.receiver(lm, texts=text, progress=False)
    with pytest.raises(HeadscopeError, match="proximity"):
        Receiver(proximity=0)


@pytest.mark.slow
def test_smollm2_finds_documents_and_looks_back(smollm2) -> None:
    """Heads that find the gold document are few, and positive; the formula on eager weights of one question."""
    method = QRHead(samples=1, documents=4)
    scores = heads.qrhead(smollm2, samples=1, documents=4, progress=False)
    (sample,) = method.prepare(smollm2)
    null = method.views(smollm2, sample)[1]
    s = [eager(smollm2, one.ids.tolist())[..., one.trial["query"][0] :, :].mean(-2) for one in (sample, null)]
    own = slice(*sample.trial["documents"][sample.trial["gold"][0]])
    expected = document_score(s[0][..., own] - s[1][..., own])
    np.testing.assert_allclose(scores.trials[0], expected, rtol=0, atol=1e-4)
    assert (scores.mean > 0.1).sum() >= 5 and np.median(scores.mean) < 0.02
    text = load_haystack()[60_000:61_800]
    ids, offsets = encode(smollm2.tokenizer, text)
    looked = heads.receiver(smollm2, texts=text, proximity=2, progress=False)
    expected = receiver_by_hand(eager(smollm2, ids), sentences(text, offsets), 2, depth=False)
    np.testing.assert_allclose(looked.trials[0], expected, rtol=1e-3, atol=1e-3)
