"""SGRS against whole passes in float64 whose eager attention weights are asked for their gradient.

Eager attention rounds its weights to float32 in a float64 model, too (6e-8 each); 1e-5 leaves room for some hundred of
these. The wrong row, layer or set of keys is off by percents.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites import is_attached
from headscope.interp.statistics.spans import OPEN, published_spans
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import SaliencyRejection, ScaleHeads, apply


def dense(model: Any, inputs: dict[str, Any], token: int, first: int, layers: list[int], own: bool = False) -> float:
    """S(token) after a text, from one pass over it and the token: the row that predicts it, or the token's own."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.enable_grad():
        output = model(**whole, output_attentions=True, use_cache=False)
        loss = torch.nn.functional.cross_entropy(output.logits[:, -2], torch.tensor([token]))
        weights = [output.attentions[layer] for layer in layers]
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
    row, scores = ids.shape[1] - (1 if own else 2), []
    for a, slope in zip(weights, slopes, strict=True):
        one = (a * slope)[0, :, row].abs().mean(0)
        one = one / one.norm().clamp(min=1e-9)
        scores.append(one[first : row + 1].mean().item() if first <= row else 1.0)
    return float(np.mean(scores))


@pytest.fixture
def double(llama: LanguageModel) -> LanguageModel:
    """Float64, and the model's own eager attention for the reference."""
    llama.model.double()
    return llama


def eager(model: Any) -> Any:
    found = copy.deepcopy(model)
    found.set_attn_implementation("eager")
    return found


def test_every_step_is_the_dense_gradient_and_the_rule(double: LanguageModel) -> None:
    fit = SaliencyRejection(layers=(0, 1), max_new_tokens=9, alpha=1.05, window=3, seed=4)
    inputs = dict(double.encode("w1 w2 w3 w4 w5 w6"))
    found, reference = fit.generate(double, inputs, span=(4, OPEN)), eager(double.model)
    assert len(found.ids) == 9 and not is_attached(double.model)
    assert any(step.fallback for step in found.steps) and not all(step.fallback for step in found.steps)
    text, taken = inputs["input_ids"][0].tolist(), list[float]()
    draw = torch.Generator().manual_seed(4)
    for step in found.steps:
        own = {"input_ids": torch.tensor([text])}
        with torch.no_grad():
            p, top = reference(**own).logits[0, -1].softmax(-1).topk(5)
        assert list(step.candidates) == top.tolist()
        assert step.probabilities == pytest.approx((p / p.sum()).tolist(), rel=1e-5)
        expected = [dense(reference, own, token, 4, [0, 1]) for token in step.candidates]
        assert step.saliency == pytest.approx(expected, rel=1e-5) and min(expected) > 1e-3
        tau = 1.05 * float(np.mean(taken[-3:])) if taken else 0.0
        assert step.threshold == pytest.approx(tau, rel=1e-5)
        order = torch.multinomial(p / p.sum(), 3, generator=draw).tolist()
        passed = [i for i in order if expected[i] >= tau]
        chosen = passed[0] if passed else int(np.argmax(expected))
        assert step.token == step.candidates[chosen] and step.fallback == (not passed)
        taken.append(expected[chosen])
        text.append(step.token)
    assert any(
        abs(x - dense(reference, {"input_ids": torch.tensor([text[:6]])}, token, 4, [0])) > 1e-3 * x
        for x, token in zip(found.steps[0].saliency, found.steps[0].candidates, strict=True)
    )
    assert list(found.ids) == text[6:] and found.text == double.tokenizer.decode(found.ids)
    assert fit.generate(double, "w1 w2 w3 w4 w5 w6", span=(4, OPEN)) == found


def test_the_authors_row_is_0_for_every_candidate(double: LanguageModel) -> None:
    inputs, reference = dict(double.encode("w1 w2 w3 w4")), eager(double.model)
    fit = SaliencyRejection(layers=(0, 1), max_new_tokens=4, row="own")
    found = fit.generate(double, inputs, span=(2, OPEN))
    for step in found.steps:
        assert set(step.saliency) == {0.0} and step.threshold == 0 and len(step.drawn) == 1 and not step.fallback
    assert dense(reference, {"input_ids": inputs["input_ids"]}, found.ids[0], 2, [0, 1], own=True) == 0


def test_on_a_model_of_images_and_text(vision: tuple[Any, dict[str, Any], int]) -> None:
    """J begins after the image; the prompt's last token passes alone, after a cache that holds the image."""
    model, inputs, stop = vision
    with published_spans({"image": (1, stop)}):
        found = SaliencyRejection(layers=(0,), max_new_tokens=3, candidates=3).generate(model, inputs)
    reference, text = eager(model), inputs["input_ids"]
    for step in found.steps:
        own = {**inputs, "input_ids": text}
        expected = [dense(reference, own, token, stop, [0]) for token in step.candidates]
        assert step.saliency == pytest.approx(expected, rel=1e-5) and min(expected) > 1e-6
        text = torch.cat([text, torch.tensor([[step.token]])], 1)


@pytest.fixture
def vision() -> tuple[Any, dict[str, Any], int]:
    """A tiny LLaVA in float64, its inputs, and where its image ends."""
    model: LlavaForConditionalGeneration = tiny_model("llava", "image-text")
    model.double()
    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    tokens = side * side + (config.vision_feature_select_strategy == "full")
    ids = torch.tensor([[5, *[config.image_token_id] * tokens, 7, 8, 9, 10]])
    size = config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "pixel_values": pixels}, 1 + tokens


def test_with_an_edit_around_it(double: LanguageModel) -> None:
    fit = SaliencyRejection(layers=(1,), max_new_tokens=3)
    plain = fit.generate(double, "w1 w2 w3", span=(1, OPEN))
    with apply(double, ScaleHeads([(0, 1), (1, 2)], 0.0), grad=True):
        edited = fit.generate(double, "w1 w2 w3", span=(1, OPEN))
    assert edited.steps[0].saliency != plain.steps[0].saliency
    with apply(double, ScaleHeads([(0, 1)], 1.0), grad=True):
        same = fit.generate(double, "w1 w2 w3", span=(1, OPEN))
    assert same.ids == plain.ids
    assert all(p.requires_grad and p.grad is None for p in double.model.parameters())


def test_an_empty_span_and_refusals(double: LanguageModel) -> None:
    fit = SaliencyRejection(layers=(0, 1), max_new_tokens=1)
    assert set(fit.generate(double, "w1 w2 w3", span=(9, OPEN)).steps[0].saliency) == {1.0}
    for given, words in (
        ({"candidates": 0}, "at least 1"),
        ({"alpha": -1.0}, "alpha at least 0"),
        ({"row": "x"}, "'predicting' or 'own'"),
        ({"seed": 1.5}, "seed must be a whole number"),
    ):
        with pytest.raises(HeadscopeError, match=words):
            SaliencyRejection(**given)  # type: ignore[arg-type]
    with pytest.raises(HeadscopeError, match="no span is called 'image'"):
        fit.generate(double, "w1 w2 w3")
    for bad in ("w1", dict(double.encode(["w1 w2 w3", "w1 w2 w3"])), dict(double.encode(["w1 w2", "w1"]))):
        with pytest.raises(HeadscopeError, match="one text of two tokens"):
            fit.generate(double, bad, span=(0, OPEN))
    with pytest.raises(HeadscopeError, match="layer 7"):
        SaliencyRejection(layers=(7,)).generate(double, "w1 w2 w3", span=(0, OPEN))
