"""Attention knockout equals eager attention with -inf in its dense mask."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.probes.patching.knockout import attention_knockout
from headscope.probes.patching.pairs import Pairs, logit_difference

CLOSE = dict(rtol=1e-4, atol=1e-6)  # two float32 softmaxes behind three layers of sums of 48: 1e-5 of a probability


def dense(lm: LanguageModel, ids: torch.Tensor, layers, queries, keys, heads=(0, 1, 2, 3)) -> torch.Tensor:
    """Logits after the last of ``ids`` by eager attention, with -inf for these pairs in these layers."""
    model = copy.deepcopy(lm.model)
    model.set_attn_implementation("eager")

    def cut(module, args, kwargs):
        mask = kwargs["attention_mask"].expand(-1, 4, -1, -1).clone()
        for head in heads:
            mask[:, head, queries, keys] = -torch.inf
        return args, kwargs | {"attention_mask": mask}

    for layer in layers:
        block = model.base_model.layers[layer]
        getattr(block, "attention", getattr(block, "self_attn", None)).register_forward_pre_hook(cut, with_kwargs=True)
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0, -1]


@pytest.mark.parametrize("window", [1, 2])
def test_it_is_eager_attention_with_minus_infinity(lm: LanguageModel, pairs: Pairs, window: int, unchanged) -> None:
    pairs = replace(pairs, spans={"subject": [(1, 4)] * 5})
    found = attention_knockout(lm, pairs, "subject", (4, 6), window=window, batch_size=3, together=2)
    assert list(found["layer"]) == [0, 1, 2] and (found["n"] == 5).all() and found.attrs["window"] == window
    changes = np.zeros((5, 3))
    for i, n in enumerate(pairs.lengths.tolist()):
        ids, answer = pairs.clean[i, :n], pairs.answers[i]
        whole = dense(lm, ids, [], slice(0), slice(0)).softmax(-1)[answer]
        for layer in range(3):
            near = [layer] if window == 1 else [x for x in (layer - 1, layer) if x >= 0]
            changes[i, layer] = dense(lm, ids, near, slice(4, 6), slice(1, 4)).softmax(-1)[answer] / whole - 1
    np.testing.assert_allclose(found["effect"], changes.mean(0), **CLOSE)
    assert np.abs(changes).max() > 0.02 and unchanged()
    assert (found["ci_low"] <= found["effect"]).all() and (found["effect"] <= found["ci_high"]).all()


def test_some_heads_in_the_metrics_own_unit(tiny_model, pairs: Pairs) -> None:
    lm = tiny_model("llama")
    found = attention_knockout(
        lm, pairs, (1, 4), heads="L1H2", window=1, metric=logit_difference, relative=False, together=3
    )
    assert found.attrs["unit"] == "metric" and (found["effect"][[0, 2]].abs() < 1e-6).all()
    want = []
    for i, n in enumerate(pairs.lengths.tolist()):
        both = [pairs.answers[i], pairs.others[i]]
        one, two = (
            dense(lm, pairs.clean[i, :n], layers, slice(n - 1, n), slice(1, 4), heads=[2]) for layers in ([1], [])
        )
        want.append(float((one - two)[both[0]] - (one - two)[both[1]]))
    assert found["effect"][1] == pytest.approx(np.mean(want), rel=1e-4, abs=1e-5)


def test_what_cannot_be_cut_is_refused(tiny_model, pairs: Pairs, unchanged_of) -> None:
    lm = tiny_model("llama")
    check = unchanged_of(lm)
    for keys, queries, settings, words in (
        ((4, 6), (1, 3), {}, "nothing to cut"),
        ("subject", -1, {}, "no span is called"),
        ((1, 3), -1, {"heads": "L9H0"}, "L9H0"),
        ((1, 3), -1, {"heads": []}, "no heads were given"),
        ((1, 3), -1, {"window": 0}, "window is"),
        ((1, 3), -1, {"metric": lambda logits, pairs: logits[:, 0] * 0}, "relative=False"),
    ):
        with pytest.raises(HeadscopeError, match=words):
            attention_knockout(lm, pairs, keys, queries, **settings)
    assert check()
