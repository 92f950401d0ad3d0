"""The size of needle methods: what runs where no prompt is asked for, and that what is asked for is what runs."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.interp import load_model
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.recall.context_activation import ContextActivation
from headscope.interp.heads.recall.locos import Locos
from headscope.interp.heads.recall.needle_method import NeedleMethod
from headscope.interp.heads.recall.retrieval import Retrieval
from headscope.interp.heads.recall.retrieval_paraphrased import RetrievalParaphrased
from headscope.interp.models import LanguageModel
from headscope.interp.prompts.needle import PAPER_LENGTHS


@pytest.fixture(scope="module")
def lm(byte_level) -> LanguageModel:
    """Of a context that takes the first three of the authors' lengths."""
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(vocab_size=1000, max_position_embeddings=6300, eos_token_id=0, bos_token_id=None, **sizes)
    return load_model(LlamaForCausalLM(config).eval(), tokenizer=byte_level(1000))


@pytest.mark.parametrize(
    ("cls", "lengths", "needles"),
    [
        (Retrieval, [600, 1000], 3),
        (RetrievalParaphrased, [600, 1000], 3),
        (Locos, [600], 3),
        (ContextActivation, [600], 10),
    ],
)
def test_small_is_the_default_and_published_a_name_away(
    lm: LanguageModel, cls: type[NeedleMethod], lengths: list[int], needles: int
) -> None:
    made, trials = cls().parameters(lm), cls().trials(lm)
    assert made["lengths"] == lengths and made["depths"] == [0, 50, 100] and len(made["needles"]) == needles
    assert len(trials) == len(lengths) * 3 * needles and sum(trial["length"] for trial in trials) <= 18_000
    published = cls(size="published").parameters(lm)
    assert published["lengths"] == [n for n in PAPER_LENGTHS if n + 50 <= 6300] == [1000, 3579, 6158]
    assert published["depths"] == [0, 11, 22, 33, 44, 56, 67, 78, 89, 100] and len(published["needles"]) == 3


def test_prompts_that_are_asked_for_are_those_of_either_size(lm: LanguageModel) -> None:
    """The trials of ``--lengths 600,1000 --depths 0,50,100``, written out: the demo's."""
    asked = {"lengths": [600, 1000], "depths": [0, 50, 100]}
    expected = [
        {"needle": needle, "length": length, "depth": depth, "text": f"{needle} in {length}"}
        for needle in Retrieval().parameters(lm)["needles"]
        for length in (600, 1000)
        for depth in (0, 50, 100)
    ]
    for size in ("small", "published"):
        assert Retrieval(size=size, **asked).trials(lm) == expected
        assert Retrieval(size=size, **asked).parameters(lm) == Retrieval().parameters(lm)
    assert len(Retrieval(size="published", lengths=[600], needles=["key"]).trials(lm)) == 10
    with pytest.raises(HeadscopeError, match="size is 'small' or 'published'"):
        Retrieval(size="large")
