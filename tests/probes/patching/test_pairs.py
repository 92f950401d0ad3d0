"""Pairs of texts take what load_model takes, and refuse in one line what no model could answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.probes.patching.pairs import Pairs

TEXTS = (["w1 w2 w3", "w4 w5"], ["w1 w9 w3", "w8 w5"])


def test_a_live_model_without_a_tokenizer_is_one_line(tiny_model) -> None:
    with pytest.raises(HeadscopeError, match="tokenizer"):
        Pairs.of(tiny_model("llama").model, *TEXTS, ["w2", "w4"], ["w9", "w8"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answers": ["zzz", "w4"]}, "no token for 'zzz'"),
        ({"answers": [40, 4]}, "none of the 40 tokens"),
        ({"others": [-1, 4]}, "none of the 40 tokens"),
        ({"answers": [1.5, "w4"]}, "as a string or an id"),
        ({"groups": [0]}, "one group a pair"),
        ({"groups": ["a", "b"]}, "one group a pair"),
    ],
)
def test_what_of_refuses(tiny_model, word_tokenizer, changes: dict[str, Any], words: str) -> None:
    lm = tiny_model("llama")
    lm.tokenizer = word_tokenizer
    given: dict[str, Any] = {"answers": ["w2", 4], "others": ["w9", "w0"]}
    assert Pairs.of(lm, *TEXTS, **given).others.tolist() == [9, 0]  # the unknown token by its own name
    with pytest.raises(HeadscopeError, match=words):
        Pairs.of(lm, *TEXTS, **given | changes)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lengths", torch.tensor([9, 7, 10, 6, 8]), "lengths of pairs are 1 to 9"),
        ("lengths", torch.tensor([9, 7, 0, 6, 8]), "lengths of pairs are 1 to 9"),
        ("groups", torch.zeros(5), "groups of pairs is a tensor of whole numbers"),
        ("groups", torch.full((5,), -1), "groups of pairs has a number below 0"),
        ("groups", torch.zeros(4, dtype=torch.long), "others and groups"),
        ("answers", [1, 2, 3, 4, 5], "answers of pairs is a tensor"),
    ],
)
def test_what_pairs_refuse(pairs: Pairs, name: str, value: Any, words: str) -> None:
    with pytest.raises(HeadscopeError, match=words):
        replace(pairs, **{name: value})
