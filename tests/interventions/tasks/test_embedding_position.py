"""Position sensitivity of embeddings, of an encoder and a decoder, against plain passes."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interventions import AblateHeads, apply, evaluate
from headscope.interventions.tasks.embedding_position import EmbeddingPosition

TEXT = (
    "The first sentence is about a dog. A second one tells of rain at night. Then the third speaks of an old bridge. "
)


@pytest.fixture(scope="module")
def encoder(reader: LanguageModel) -> LanguageModel:
    """A tiny BERT with the reader's tokenizer."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)
    model = BertModel(BertConfig(vocab_size=600, initializer_range=0.3, **sizes)).eval()
    return LanguageModel.wrap(model, reader.tokenizer, name="tiny bert", revision="seed 0")


def embedding(lm: Any, text: str, pool: str) -> torch.Tensor:
    ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        last = lm.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].double()
    return {"mean": last.sum(0) / len(last), "first": last[0], "last": last[-1]}[pool]


@pytest.mark.parametrize("kind", ["encoder", "reader"])
@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_cosines_by_hand(kind: str, pool: str, request: pytest.FixtureRequest) -> None:
    lm = request.getfixturevalue(kind)
    one, two, three = (part.strip() + "." for part in TEXT.split(".")[:3])
    texts = {
        "remove": [f"{two} {three}", f"{one} {three}", f"{one} {two}"],
        "move": [f"{two} {three} {one}", f"{two} {one} {three}", f"{three} {one} {two}"],
    }
    for change, expected in texts.items():
        task = EmbeddingPosition(passages=1, sentences=3, change=change, pool=pool, text=TEXT)
        whole = embedding(lm, f"{one} {two} {three}", pool)
        for trial, text in zip(task.trials(lm), expected, strict=True):
            other = embedding(lm, text, pool)
            by_hand = float(whole @ other / whole.norm() / other.norm())
            assert task.run(lm, trial)["score"] == pytest.approx(by_hand, abs=1e-5)
            read = sum(len(lm.tokenizer(t)["input_ids"]) for t in (f"{one} {two} {three}", text))
            assert task.tokens(lm, trial) == (read, 0)


def test_insertions_have_one_place_more(reader: LanguageModel) -> None:
    task = EmbeddingPosition(passages=1, sentences=3, change="insert", text=TEXT)
    texts = [task.changed(trial)[0] for trial in task.trials(reader)]
    new = task.changed({"passage": 0, "place": 0})[1]
    assert new is not None and len(texts) == 4
    assert texts[0].startswith(new) and texts[-1].endswith(new) and all(text.count(new) == 1 for text in texts)


def test_an_edit_of_an_encoder_is_evaluated(encoder: LanguageModel) -> None:
    """Without attention a token's state is its own and its position's: a removal at the end then leaves the others'."""
    task = EmbeddingPosition(passages=1, sentences=3, text=TEXT)
    result = evaluate(encoder, [task], [AblateHeads([(0, 1), (1, 2)])], controls=1, progress=False)
    assert result.scores(task.name).nunique(axis=1).eq(3).all(), "edits change nothing"
    with apply(encoder, AblateHeads([(layer, head) for layer in range(2) for head in range(4)])):
        first = task.embed(encoder, "The first sentence is about a dog.")
        other = EmbeddingPosition(pool="first").embed(encoder, "The first sentence")
        again = EmbeddingPosition(pool="first").embed(encoder, "The end of it")
    assert torch.allclose(other, again) and not torch.allclose(first, other), "the first token saw others"


def test_places_apart() -> None:
    frame = pd.DataFrame({"place": [0, 1, 2, 0], "score": [0.5, 0.8, 0.9, 0.7]})
    found = EmbeddingPosition(sentences=3).summarise(frame)
    expected = {"cosine at 1": 0.6, "cosine at 2": 0.8, "cosine at 3": 0.9, "spread": 0.3, "first - last": -0.3}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmbeddingPosition(change="swap"), "change is one of remove, insert, move"),
        (lambda: EmbeddingPosition(pool="max"), "pool is one of mean, first, last"),
        (lambda: EmbeddingPosition(sentences=1), "sentences is a whole number of at least 2"),
        (lambda: EmbeddingPosition(text=TEXT).loaded, "the text has 3 sentences, and 4 passages of 6"),
    ],
)
def test_bad_settings_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(HeadscopeError, match=message):
        make()
