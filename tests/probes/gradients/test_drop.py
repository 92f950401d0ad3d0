"""Saliency of an answer's tokens against autograd through eager attention, on text and on a tiny LLaVA."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp import load_model
from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.look import extended
from headscope.interp.statistics.spans import published_spans
from headscope.interp.survey.tiny import tiny_model
from headscope.probes.gradients.drop import saliency_drop
from headscope.probes.gradients.saliency_map import saliency_map

ANSWER = [7, 3, 9]


@pytest.fixture(scope="module")
def seeing() -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny LLaVA and a prompt of two words, a picture's tokens and three words."""
    model = tiny_model("llava", "image-text")
    side = model.config.vision_config.image_size
    count = (side // model.config.vision_config.patch_size) ** 2
    ids = torch.tensor([[5, 6, *[model.config.image_token_id] * count, 8, 9, 10]])
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return load_model(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def weights(lm: Any, inputs: dict[str, torch.Tensor], target: int) -> tuple[np.ndarray, np.ndarray]:
    """A (layer, head, query, key) of the eager model and dL/dA, by autograd."""
    model = copy.deepcopy(lm.model)
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True, use_cache=False)
    for p in output.attentions:
        p.retain_grad()
    (-output.logits[0, -1].log_softmax(-1)[target]).backward()
    return tuple(
        torch.stack([x[0].detach() for x in xs]).numpy()
        for xs in zip(*((p, p.grad) for p in output.attentions), strict=True)
    )


def test_each_token_is_explained_where_it_is_predicted(seeing) -> None:
    lm, inputs = seeing
    first = inputs["input_ids"].shape[1] - 3
    found = saliency_drop(lm, inputs, ANSWER, after=(2, first), layers=[0, 1], progress=False)
    for t, token in enumerate(ANSWER):
        p, slope = weights(lm, extended(inputs, ANSWER[:t]), token)
        row = np.abs(p * slope)[:, :, -1].mean(1)  # (layer, key) of the row that predicts it
        want = (row / np.linalg.norm(row, axis=-1, keepdims=True))[:, first:].mean(-1)
        np.testing.assert_allclose(found.layers[t], want, rtol=1e-3)  # float32 passes, as in test_saliency
        assert want.min() > 1e-4
    s = found.saliency
    np.testing.assert_allclose(s, found.layers.mean(1))
    np.testing.assert_allclose(found.drop, [np.nan, s[1] / s[0], s[2] / s[:2].mean()])
    some = saliency_drop(lm, inputs, ANSWER, after=(2, first), layers=[1], tokens=[2], progress=False)
    assert some.tokens == (2,) and some.saliency == pytest.approx(found.layers[2:, 1])
    assert found.to_frame()["token"].tolist() == [0, 1, 2]


def test_a_word_that_nothing_behind_the_picture_leads_to(tiny: Any) -> None:
    """The drop is of the mean of the last five; with no key behind the span S is 1, as in their code."""
    lm = tiny("llama", num_key_value_heads=2, head_dim=8)
    with published_spans({"image": (0, 3)}):
        found = saliency_drop(lm, "w1 w2 w3", [4, 5], progress=False)
    assert found.saliency[0] == 1.0 and found.texts == ("w2", "w3") and 0 < found.saliency[1] < 1
    assert found.drop[1] == pytest.approx(found.saliency[1])
    with pytest.raises(HeadscopeError, match=r"tokens=\[2\] of an answer of 2"):
        saliency_drop(lm, "w1 w2", [4, 5], tokens=[2], after=(0, 1))
    with pytest.raises(HeadscopeError, match="no span is called 'image'"):
        saliency_drop(lm, "w1 w2", [4, 5])


def test_the_picture_as_described_and_as_drawn(seeing) -> None:
    lm, inputs = seeing
    p, slope = weights(lm, inputs, 7)
    kept = np.flatnonzero((inputs["input_ids"][0] != lm.model.config.image_token_id).numpy())
    scores = np.log(np.where(p > 0, p, 1))

    def drawn(w: np.ndarray) -> np.ndarray:
        total = 0.0
        for one in np.abs(w).mean(1)[:, kept][:, :, kept]:
            total = total + (one - one.min()) / (one.max() - one.min())
        total = np.log1p(total)
        return (total - total.min()) / (total.max() - total.min())

    span = (2, int(kept[2]))
    found = saliency_map(lm, inputs, 7, without=span)
    np.testing.assert_allclose(found, drawn(p * slope), atol=1e-3)
    bug = saliency_map(lm, inputs, 7, without=span, reference_bug=True)
    lse = dense_lse(lm, inputs)
    np.testing.assert_allclose(bug, drawn(np.where(p > 0, scores + lse, 0) * (p * slope)[0]), atol=1e-3)
    assert np.abs(bug - found).max() > 0.01


def dense_lse(lm: Any, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """logsumexp of every row (layer, head, query, 1), so that log A + lse are the scores before softmax."""
    from headscope.interp import trace

    with trace(lm, "logsumexp") as tracer, torch.no_grad():
        lm.model(**inputs)
    return tracer.record["logsumexp"].isel(example=0).transpose("layer", "head", "query").to_numpy()[..., None]
