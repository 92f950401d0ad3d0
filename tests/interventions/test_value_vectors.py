"""Edited value vectors against the same edit of the weights; anchored neurons against folded weights in float64.

Tolerance: 1e-5 of the largest logit, as for every edit (see test_ablate.py).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites.layout import stream_layers
from headscope.interp.sites.neurons import down_projection, value_vectors
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import EditValueVectors, apply
from headscope.probes import anchored_neurons, away_from_anchor

NEURONS = [(1, 5), (0, 3), (1, 2)]
FOUND = ["llama", "gpt2", "gpt_neox", "phi", "gemma2", "gemma3_text", "olmo2", "starcoder2", "bert"]
MIXED = "mixture of experts.*name other layers"
REFUSED = {
    **dict.fromkeys(["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"], MIXED),
    "opt": "does not take tokens as",
}


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**given).logits[given["attention_mask"].bool()]
    return found


def vectors(model: Any) -> list[Tensor]:
    """Views of every layer's value vectors, (neuron, d_model)."""
    return [value_vectors(down_projection(layer, model)) for layer in stream_layers(model, "language")]


def by_hand(model: Any, factor: float, add: Tensor, strength: float) -> Any:
    """A copy whose weights are edited."""
    own = copy.deepcopy(model)
    held = vectors(own)
    for row, (layer, neuron) in zip(add, NEURONS, strict=True):
        v = held[layer][neuron]
        v += strength * ((factor - 1) * v + row)
    return own


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("name", FOUND)
def test_it_is_the_edit_of_the_weights(name: str, strength: float) -> None:
    model, given = tiny_model(name), tokens()
    add = torch.randn(3, vectors(model)[0].shape[1], generator=torch.Generator().manual_seed(1))
    expected, before = logits(by_hand(model, -0.5, add, strength), given), logits(model, given)
    with apply(model, EditValueVectors(NEURONS, factor=-0.5, add=add, strength=strength)):
        found = logits(model, given)
    scale = float(expected.abs().max())
    assert float((expected - before).abs().max()) > 1e-3 * scale
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    assert torch.equal(logits(model, given), before)


def test_rows_alone(llama: LanguageModel) -> None:
    """At positions: a plain hook on the projection; the first row of the padded prompt is its fourth."""
    given, model = tokens(), llama.model
    add = torch.randn(32, generator=torch.Generator().manual_seed(1))
    at = given["attention_mask"].cumsum(-1) - 1
    mine = ((at >= 2) & (at < 4) & given["attention_mask"].bool())[..., None]

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + mine * args[0][..., 7:8] * add

    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(hook)
    expected = logits(model, given)
    handle.remove()
    with apply(llama, EditValueVectors([(1, 7)], add=add, positions=(2, 4))):
        found = logits(model, given)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert float((logits(model, given) - expected).abs().max()) > 1e-2


def test_settings_that_change_nothing_put_nothing_on_the_model(llama: LanguageModel) -> None:
    given, before = tokens(), logits(llama.model, tokens())
    with apply(llama, EditValueVectors(NEURONS)):
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in llama.model.modules())
        assert torch.equal(logits(llama.model, given), before)


@pytest.mark.parametrize("name", list(REFUSED))
def test_where_neurons_are_not_known_it_is_refused(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(HeadscopeError, match=REFUSED[name]) as refused:
        with apply(model, EditValueVectors([(1, 0)], factor=0.0)):
            logits(model, tokens())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"neurons": []}, "at least one"),
        ({"neurons": [(0, 1), (0, 1)]}, "once"),
        ({"neurons": 3}, "pairs"),
        ({"neurons": [(9, 1)], "factor": 0.0}, "has 2 layers"),
        ({"neurons": [(1, 48)], "factor": 0.0}, "its MLP has 48"),
        ({"neurons": [(1, 4)], "add": torch.ones(31)}, "has 31 dimensions, layer 1 writes 32"),
        ({"neurons": [(1, 4)], "add": torch.ones(2, 32)}, "floating-point tensor"),
        ({"neurons": [(1, 4)], "add": 1.0}, "floating-point tensor"),
    ],
)
def test_what_does_not_fit_is_refused(llama: LanguageModel, given: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadscopeError, match=message), apply(llama, EditValueVectors(**given)):
        logits(llama.model, tokens())


@pytest.mark.parametrize("lm", ["gpt2"], indirect=True)
def test_anchored_neurons_are_those_of_folded_weights(lm: LanguageModel) -> None:
    """Methods' section 6 with the folding of additions L6, written out for GPT-2 in float64."""
    model, prompt = lm.model.double(), "w5 w19 w2 w31"
    text = model.transformer
    with torch.no_grad():
        for parameter in (text.ln_f.weight, text.ln_f.bias, text.h[1].mlp.c_proj.bias):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    anchor, answer = 11, 23
    u = model.lm_head.weight.detach() * text.ln_f.weight.detach()
    shift = model.lm_head.weight.detach() @ text.ln_f.bias.detach()
    u, shift = u - u.mean(0), shift - shift.mean()
    kept: list[Tensor] = []
    handles = [
        block.mlp.c_proj.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, -1])) for block in text.h
    ]
    with torch.no_grad():
        model(**lm.encode(prompt))
    for handle in handles:
        handle.remove()
    wanted = []
    for layer in (1, 0):
        w, b = (x.detach() for x in (text.h[layer].mlp.c_proj.weight, text.h[layer].mlp.c_proj.bias))
        w, b, m = w - w.mean(-1, keepdim=True), b - b.mean(), kept[layer]
        size = m.abs() * w.norm(dim=-1)
        for neuron in size.argsort(descending=True)[:6].tolist():
            x = m[neuron] * w[neuron] + b
            x = (x - x.mean()) / (x.var(correction=0) + text.ln_f.eps).sqrt()
            gap = float((u[anchor] - u[answer]) @ x + shift[anchor] - shift[answer])
            if gap > 0.3:
                wanted.append((layer, neuron, float(m[neuron]), float(size[neuron]), gap))
    found = anchored_neurons(lm, prompt, anchor, answer, top=6, gap=0.3)
    assert wanted and [(n.layer, n.neuron) for n in found] == [one[:2] for one in wanted]
    for ours, one in zip(found, wanted, strict=True):
        assert (ours.activation, ours.size, ours.gap) == pytest.approx(one[2:], rel=1e-5)
    added = away_from_anchor(lm, anchor, answer)
    assert torch.allclose(added.double(), 8 * u[answer] - u[anchor], atol=1e-5)


def test_a_planted_neuron_is_found_and_turned(llama: LanguageModel) -> None:
    """A neuron that writes the anchor's row of the unembedding; turned, the answer wins."""
    model, anchor, answer = llama.model, "w5", "w9"
    ids = llama.encode("w3 w8 w30")
    (one, two) = (int(llama.tokenizer(t, add_special_tokens=False).input_ids[0]) for t in (anchor, answer))
    seen: list[Tensor] = []
    projection = model.model.layers[1].mlp.down_proj
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
    with torch.no_grad():
        model(**ids)
        handle.remove()
        m = float(seen[0][4])
        u = model.lm_head.weight * model.model.norm.weight
        projection.weight[:, 4] = 40 * (u[one] - u[two]) / m
    (planted,) = [n for n in anchored_neurons(llama, "w3 w8 w30", anchor, answer, gap=1.0) if n.neuron == 4]
    assert planted.layer == 1 and planted.activation == pytest.approx(m)
    sign = 1.0 if m > 0 else -1.0
    add = sign * away_from_anchor(llama, anchor, answer, less=100.0, more=800.0)
    wins = []
    for edit in ([], [EditValueVectors([(1, 4)], add=add)]):
        with apply(llama, *edit), torch.no_grad():
            found = model(**ids).logits[0, -1]
        wins.append(float(found[one] - found[two]))
    assert wins[0] > 1 and wins[1] < -1


@pytest.mark.slow
def test_on_smollm2(smollm2: Any) -> None:
    """The largest neuron of each layer by |m| |v|: its vector turned towards the answer by the sign of its activation
    raises the answer over the anchor."""
    prompt = "Question: What is the capital of France? Answer Choices: A: Rome B: Paris Answer:"
    found = anchored_neurons(smollm2, prompt, " A", " B", top=1, gap=-1e9)
    assert [n.layer for n in found] == list(range(smollm2.info.layers))[::-1]
    pair = [smollm2.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in (" A", " B")]
    near, last = away_from_anchor(smollm2, " A", " B"), next(n for n in found if n.layer == 29)

    def gap() -> float:
        one, two = smollm2(prompt).logits[0, -1, pair].tolist()
        return float(one - two)

    before = gap()
    sign = 1.0 if last.activation > 0 else -1.0
    with apply(smollm2, EditValueVectors([(29, last.neuron)], add=sign * near)):
        assert gap() < before
    assert gap() == before
