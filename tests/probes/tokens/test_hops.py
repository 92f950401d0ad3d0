"""Scores of paths by hand, by both definitions; activations and effects are what the model's own logits say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.probes.tokens.hops import Concepts, concept_activations, concept_effects, hop_paths, score_path


def planted(peaks: list[tuple[int, int, float]], effect: Any = None) -> Concepts:
    shown = np.zeros((8, 8, len(peaks)))
    for concept, (layer, position, size) in enumerate(peaks):
        shown[layer, position, concept] = size
    names = tuple(f"c{i}" for i in range(len(peaks)))
    return Concepts(names, tuple(range(len(peaks))), shown, np.zeros((len(peaks),) * 2) if effect is None else effect)


def test_a_path_by_hand() -> None:
    effect = np.zeros((3, 3))
    effect[0, 1], effect[1, 2], effect[0, 2] = 0.3, 0.0, 0.4
    found = planted([(1, 2, 0.1), (3, 4, 0.2), (6, 5, 0.15)], effect)
    paper, code = (score_path(found, (0, 1, 2), name) for name in ("paper", "code"))
    links = (0.5 * 0.3) / 1.5 * 0.75  # one of two links is there
    assert paper.peaks == ((1, 2), (3, 4), (6, 5)) and paper.concepts == ("c0", "c1", "c2")
    assert paper.parts["order"] == 1.0 and paper.parts["gap"] == pytest.approx(0.75)  # layers lie 2 and 3 apart
    assert paper.parts["activation"] == pytest.approx(0.75) and paper.parts["causal"] == pytest.approx(links)
    expected = 0.4 + 0.4 * 0.75 + 0.2 * links - 0.05 * 0.75 + 0.2 * 0.15
    assert paper.score == pytest.approx(expected)
    # in the code the second link, missing, is half of the first concept's on the last; weights count twice
    twice = (0.25 * 0.3 + 1.0 * 0.2) / 1.5 * 0.75
    assert code.parts["causal"] == pytest.approx(twice)
    assert code.score == pytest.approx((0.4 + 0.4 * 0.75 + 0.2 * twice + 0.05 * 0.75 + 0.2 * 0.15) / 1.25)
    assert score_path(found, (2, 1, 0)).parts["order"] == 0.0
    assert score_path(planted([(1, 2, 0.1), (0, 0, 0.0)]), (0, 1)).score == 0.0  # the second concept is nowhere


def test_activations_and_effects_are_the_models(tiny: Any) -> None:
    lm = tiny("llama", num_key_value_heads=2, head_dim=8)
    text, ids = "w3 w1 w4 w1 w5", (7, 9)
    encoded = lm.encode(text)
    with torch.no_grad():
        hidden = lm.model.model(**encoded, output_hidden_states=True).hidden_states
        logits = lm.model(**encoded).logits[0, -1]
    weight = lm.model.lm_head.weight[list(ids)]
    paper, code, lens = (concept_activations(lm, text, ids, name) for name in ("paper", "code", "lens"))
    assert paper.shape == (2, 5, 2) and code.shape == (2, 4, 2)
    first = (hidden[1][0] @ weight.T).clamp(min=0).detach().numpy()  # behind the first layer, before any norm
    np.testing.assert_allclose(paper[0], first, atol=1e-5)
    np.testing.assert_allclose(code[0], np.where(first > 0.001, first, 0)[1:], atol=1e-5)
    np.testing.assert_allclose(lens[-1, -1], logits.softmax(-1)[list(ids)], atol=1e-6)
    changed = encoded["input_ids"].clone()
    changed[0, 2] = 20
    with torch.no_grad():
        other = lm.model(input_ids=changed).logits[0, -1]
    for name, difference in (("paper", logits.softmax(-1) - other.softmax(-1)), ("code", logits - other)):
        found = concept_effects(lm, text, ids, [2], 20, name)
        np.testing.assert_allclose(found[0], difference[list(ids)], atol=1e-5)


def test_paths_are_sorted_and_bad_settings_refused(tiny: Any) -> None:
    lm = tiny("llama", num_key_value_heads=2, head_dim=8)
    found = hop_paths(lm, "w3 w1 w4", ["w3", "w4"], ["w5", "w6"], definition="lens", replacement="w9")
    assert len(found) == 4 and [path.score for path in found] == sorted((p.score for p in found), reverse=True)
    assert all(path.concepts[-1] in ("w5", "w6") for path in found)
    with pytest.raises(HeadscopeError, match="1 to 6 concepts"):
        hop_paths(lm, "w3", [])
    with pytest.raises(HeadscopeError, match="definition is"):
        hop_paths(lm, "w3", ["w1"], definition="other")
