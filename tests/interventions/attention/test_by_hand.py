"""Edits of the pattern against the same edit of a dense float64 pattern inside the model's own eager attention.

Tolerance: 1e-5 of the largest logit, as for every edit (see test_ablate.py); a wrong edit moves more than 1e-2 of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import prompt_boundary
from headscope.interventions import (
    BoostRecent,
    CalibrateAttention,
    Composed,
    Edit,
    ForcePattern,
    RedistributeSinks,
    ScaleSinks,
    SwapKeys,
    apply,
)

LAYERS, HEADS, D_HEAD = 2, 4, 8
PICKED = [(0, 1), (1, 0), (1, 3)]
LENGTH, PAD = 12, 3
START = torch.tensor([0, PAD])
AT = torch.arange(LENGTH) - START[:, None]  # (example, position); below 0 is padding


def tokens() -> tuple[Tensor, Tensor]:
    """Two prompts, the second padded to the left."""
    ids = torch.randint(2, 64, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    return ids, (AT >= 0).long()


Hand = Callable[[int, Tensor], Tensor]  # layer, pattern (batch, head, query, key) in float64 -> pattern


@contextmanager
def by_hand(hand: Hand) -> Iterator[None]:
    """Inside the block eager attention of llama and mistral uses ``hand(layer, pattern)``."""

    def eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        k, v = (x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = query.double() @ k.transpose(2, 3) * scaling + (0 if mask is None else mask[..., : k.shape[2]])
        p = hand(module.layer_idx, scores.softmax(-1))
        return (p @ v).transpose(1, 2).to(query.dtype).contiguous(), p

    modules = (modeling_llama, modeling_mistral)
    own = [module.eager_attention_forward for module in modules]
    try:
        for module in modules:
            module.eager_attention_forward = eager
        yield
    finally:
        for module, function in zip(modules, own, strict=True):
            module.eager_attention_forward = function


def eager_copy(model: Any) -> Any:
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


@pytest.fixture
def windowed() -> Any:
    """A Mistral of two layers with grouped heads and a window of 4 tokens."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=48, head_dim=D_HEAD, max_position_embeddings=128, vocab_size=64)
    groups = dict(num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=2, initializer_range=0.3)
    return MistralForCausalLM(MistralConfig(**sizes, **groups, sliding_window=4, pad_token_id=None)).eval()


def logits(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    at = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=at, **options).logits
    return found


def chosen(layer: int, p: Tensor, new: Tensor, heads: list[tuple[int, int]] | None) -> Tensor:
    """``new`` in the heads of this layer, ``p`` in the others."""
    mine = torch.zeros(p.shape[1], dtype=torch.bool)
    mine[[h for at, h in heads if at == layer] if heads is not None else slice(None)] = True
    return torch.where(mine[None, :, None, None], new, p)


def at(first: int, stop: int) -> Tensor:
    """Keys at these positions of each example: (example, 1, 1, key)."""
    return ((AT >= first) & (AT < stop))[:, None, None]


def scaled(factor: float, renormalise: bool, keys: Tensor, heads: Any) -> Hand:
    def hand(layer: int, p: Tensor) -> Tensor:
        new = torch.where(keys, factor * p, p)
        if renormalise:
            left = new.sum(-1, keepdim=True)
            only = (p * ~keys).sum(-1, keepdim=True) == 0  # sees sinks alone
            new = torch.where(only, p, p.sum(-1, keepdim=True) * new / left.clamp(min=1e-300))
        return chosen(layer, p, new, heads)

    return hand


def calibrated(beta: float, threshold: float, heads: Any, prompt: int = LENGTH) -> Hand:
    """As ACT's code writes it, one example and head after the other; sets over the ``prompt``'s rows."""

    def hand(layer: int, p: Tensor) -> Tensor:
        new = p.clone()
        for b in range(p.shape[0]):
            first = int(START[b])
            for h in range(p.shape[1]):
                a = p[b, h, first:, first:]
                rows = prompt - first
                received = a[:rows].sum(0)[:rows] / (rows - torch.arange(rows))
                later = torch.nonzero(received > threshold)[:, 0].tolist()[1:]
                freed = (1 - beta) * a[:, later].sum(1)
                edited, others = a.clone(), a.clone()
                edited[:, later] *= beta
                others[:, later] = 0
                moved = edited + freed[:, None] * others / others.sum(1, keepdim=True)
                new[b, h, first:, first:] = torch.where(others.sum(1, keepdim=True) > 0, moved, a)
        return chosen(layer, p, new, heads)

    return hand


def swapped(one: int, two: int, strength: float, heads: Any) -> Hand:
    def hand(layer: int, p: Tensor) -> Tensor:
        new = p.clone()
        for b in range(2):
            i, j = one + int(START[b]), two + int(START[b])
            for q in range(max(i, j), LENGTH):
                new[b, :, q, i] = (1 - strength) * p[b, :, q, i] + strength * p[b, :, q, j]
                new[b, :, q, j] = (1 - strength) * p[b, :, q, j] + strength * p[b, :, q, i]
        return chosen(layer, p, new, heads)

    return hand


def forced(keys: Tensor, strength: float, heads: Any) -> Hand:
    def hand(layer: int, p: Tensor) -> Tensor:
        seen = keys & (torch.arange(LENGTH) <= torch.arange(LENGTH)[:, None])
        count = seen.sum(-1, keepdim=True)
        new = (1 - strength) * p + strength * seen / count.clamp(min=1)
        return chosen(layer, p, torch.where(count > 0, new, p), heads)

    return hand


def boosted(beta: float, window: int, renormalise: bool, first: int, heads: Any) -> Hand:
    """``first``: where boosted tokens begin, from each example's first token."""

    def hand(layer: int, p: Tensor) -> Tensor:
        gap = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        near = (gap >= 1) & (gap <= window) & (AT >= first)[:, None, None]
        new = torch.where(near, (1 + beta) * p, p)
        return chosen(layer, p, new / new.sum(-1, keepdim=True) if renormalise else new, heads)

    return hand


CASES: dict[str, tuple[Edit, Hand]] = {
    "sinks removed": (ScaleSinks(PICKED), scaled(0.0, True, at(0, 1), PICKED)),
    "sinks removed by half": (ScaleSinks(strength=0.5, sinks=2), scaled(0.5, True, at(0, 2), None)),
    "sinks lost": (ScaleSinks(PICKED, renormalise=False), scaled(0.0, False, at(0, 1), PICKED)),
    "a span grown": (ScaleSinks(factor=3.0, sinks=(2, 5)), scaled(3.0, True, at(2, 5), None)),
    "a span grown, not rescaled": (
        ScaleSinks(factor=3.0, sinks=(2, 5), renormalise=False),
        scaled(3.0, False, at(2, 5), None),
    ),
    "calibrated": (CalibrateAttention(PICKED, threshold=0.15), calibrated(0.4, 0.15, PICKED)),
    "calibrated, all heads": (CalibrateAttention(beta=0.1, sets="pass"), calibrated(0.1, 0.1, None)),
    "swapped": (SwapKeys(PICKED, first=(1, 2), second=(4, 5)), swapped(1, 4, 1.0, PICKED)),
    "swapped by a third": (SwapKeys(first=(4, 5), second=(0, 1), strength=1 / 3), swapped(4, 0, 1 / 3, None)),
    "forced": (ForcePattern(PICKED, onto=[[(1, 2), (3, 5)]]), forced(at(1, 2) | at(3, 5), 1.0, PICKED)),
    "forced by half": (ForcePattern(onto=(2, 4), strength=0.5), forced(at(2, 4), 0.5, None)),
    "recent": (
        BoostRecent(PICKED, beta=2.0, window=3, previous="all"),
        boosted(2.0, 3, False, 0, PICKED),
    ),
    "recent, rescaled": (
        BoostRecent(beta=2.0, window=3, previous="all", renormalise=True),
        boosted(2.0, 3, True, 0, None),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_it_is_the_dense_edit(llama: LanguageModel, name: str) -> None:
    """Grouped key/value heads and left padding."""
    edit, hand = CASES[name]
    ids, mask = tokens()
    with by_hand(hand):
        expected = logits(eager_copy(llama.model), ids, mask)[mask.bool()]
    before = logits(llama.model, ids, mask)[mask.bool()]
    with apply(llama, edit):
        found = logits(llama.model, ids, mask)[mask.bool()]
    scale = float(expected.abs().max())
    assert float((expected - before).abs().max()) > 1e-2 * scale, "the edit hardly changes anything"
    assert float((found - expected).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("name", ["sinks removed", "sinks lost", "a span grown", "calibrated", "recent", "swapped"])
def test_in_layers_with_a_window(windowed: Any, name: str) -> None:
    """A window of 4 tokens: most rows do not see the sinks; keys that a row does not see are not swapped."""
    edit, hand = CASES[name]
    ids, mask = tokens()

    def both(layer: int, p: Tensor) -> Tensor:
        new = hand(layer, p)
        if name == "swapped":  # rows that see one of the two keys alone
            seen = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)) < 4
            keep = torch.stack([seen[:, 1 + s] & seen[:, 4 + s] for s in START.tolist()])[:, None, :, None]
            new = torch.where(keep, new, p)
        return new

    with by_hand(both):
        expected = logits(eager_copy(windowed), ids, mask)[mask.bool()]
    with apply(windowed, edit):
        found = logits(windowed, ids, mask)[mask.bool()]
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    assert float((expected - logits(windowed, ids, mask)[mask.bool()]).abs().max()) > 1e-2 * scale


# (first, second) of the composition -> what each is by hand; scores are edited before mass moves, whatever the order
OTHERS = [(0, 0), (0, 1), (1, 1)]  # two of them are none of PICKED
PAIRS: dict[str, tuple[list[Edit], list[Hand]]] = {
    "other heads of one layer": (
        [ScaleSinks(PICKED), ScaleSinks([(0, 0), (0, 3), (1, 2)], sinks=(2, 4), factor=0.5, renormalise=False)],
        [scaled(0.0, True, at(0, 1), PICKED), scaled(0.5, False, at(2, 4), [(0, 0), (0, 3), (1, 2)])],
    ),
    "the same heads": (
        [ScaleSinks(PICKED), ScaleSinks(OTHERS, sinks=(0, 3), factor=2.0)],
        [scaled(0.0, True, at(0, 1), PICKED), scaled(2.0, True, at(0, 3), OTHERS)],
    ),
    "the same heads, the other way round": (
        [ScaleSinks(OTHERS, sinks=(0, 3), factor=2.0), ScaleSinks(PICKED)],
        [scaled(2.0, True, at(0, 3), OTHERS), scaled(0.0, True, at(0, 1), PICKED)],
    ),
    "calibrated without the first token": (
        [ScaleSinks(strength=0.9), CalibrateAttention(PICKED, threshold=0.15)],
        [scaled(0.1, True, at(0, 1), None), calibrated(0.4, 0.15, PICKED)],
    ),
    "three": (
        [ScaleSinks(strength=0.5), CalibrateAttention(threshold=0.15), ScaleSinks(PICKED, sinks=2, renormalise=False)],
        [scaled(0.5, True, at(0, 1), None), calibrated(0.4, 0.15, None), scaled(0.0, False, at(0, 2), PICKED)],
    ),
    "recent after sinks": (
        [ScaleSinks(), BoostRecent(PICKED, beta=2.0, window=3, previous="all")],
        [boosted(2.0, 3, False, 0, PICKED), scaled(0.0, True, at(0, 1), None)],
    ),
    "swapped after sinks": (
        [ScaleSinks(renormalise=False), SwapKeys(PICKED, first=(0, 1), second=(4, 5))],
        [swapped(0, 4, 1.0, PICKED), scaled(0.0, False, at(0, 1), None)],
    ),
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_composed_they_are_the_dense_edits_one_after_the_other(llama: LanguageModel, name: str) -> None:
    """Grouped key/value heads and left padding; in one block and in one block each."""
    edits, hands = PAIRS[name]
    ids, mask = tokens()

    def hand(layer: int, p: Tensor) -> Tensor:
        for one in hands:
            p = one(layer, p)
        return p

    with by_hand(hand):
        expected = logits(eager_copy(llama.model), ids, mask)[mask.bool()]
    with apply(llama, Composed(edits)):
        found = logits(llama.model, ids, mask)[mask.bool()]
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= 1e-5 * scale
    with apply(llama, *edits):
        assert torch.equal(logits(llama.model, ids, mask)[mask.bool()], found)
    for edit in edits:
        with apply(llama, edit):
            assert float((logits(llama.model, ids, mask)[mask.bool()] - expected).abs().max()) > 1e-2 * scale


@pytest.mark.parametrize("name", ["sinks lost", "swapped", "forced by half", "recent", "recent, rescaled"])
def test_a_prompt_in_chunks(llama: LanguageModel, name: str) -> None:
    edit, _ = CASES[name]
    ids, mask = tokens()
    with apply(llama, edit):
        whole = logits(llama.model, ids, mask)[:, -1]
        cache, found = None, None
        for first, stop in ((0, 5), (5, 9), (9, LENGTH)):
            at_ = (mask.cumsum(-1) - 1).clamp(min=0)[:, first:stop]
            options = dict(attention_mask=mask[:, :stop], position_ids=at_, past_key_values=cache, use_cache=True)
            with torch.no_grad():
                output = llama.model(input_ids=ids[:, first:stop], **options)
            cache, found = output.past_key_values, output.logits[:, -1]
    assert found is not None and float((found - whole).abs().max()) <= 1e-5 * float(whole.abs().max())


def test_calibration_keeps_the_sets_of_the_prompt(llama: LanguageModel) -> None:
    """One pass over prompt and continuation, cached steps, and the edit by hand with the prompt's sets."""
    ids, mask = tokens()
    edit = CalibrateAttention(threshold=0.15)
    prompt = 8
    with by_hand(calibrated(0.4, 0.15, None, prompt)):
        expected = logits(eager_copy(llama.model), ids, mask)[mask.bool()]
    with apply(llama, edit), prompt_boundary(prompt, padded=True):
        whole = logits(llama.model, ids, mask)[mask.bool()]
    assert float((whole - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    with apply(llama, CalibrateAttention(threshold=0.15, sets="pass")):
        assert float((logits(llama.model, ids, mask)[mask.bool()] - expected).abs().max()) > 1e-3


def test_output_tokens_alone_are_boosted(llama: LanguageModel) -> None:
    ids, mask = tokens()
    first = 5  # tokens of each example's prompt
    with by_hand(boosted(1.0, 2, False, first, None)):
        expected = logits(eager_copy(llama.model), ids, mask)[mask.bool()]
    with apply(llama, BoostRecent(beta=1.0, window=2)), prompt_boundary(first):
        found = logits(llama.model, ids, mask)[mask.bool()]
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert float((logits(llama.model, ids, mask)[mask.bool()] - expected).abs().max()) > 1e-2


IMAGE = (2, 7)


def visual(meaning: str, rho: float, share: float, tau: float, dimensions: list[int], streams: list[Tensor]) -> Hand:
    """VAR by its specification, from the streams that enter the layers; the prompt is all of the text."""

    def hand(layer: int, p: Tensor) -> Tensor:
        x = streams[layer].double()
        phi = (x[..., dimensions] / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).abs().amax(-1)
        sinks = ((phi > tau) & (AT >= 0))[:, None, None]
        image = at(*IMAGE)
        on_image, on_sinks = (p * image).sum(-1), (p * (image & sinks)).sum(-1)
        if meaning == "code":
            right = on_sinks / (on_image + 1e-6 * (IMAGE[1] - IMAGE[0])) <= rho
        else:
            right = (p * (image & ~sinks)).sum(-1) / on_image >= rho
        mine = right & (on_image >= 0.1) & (AT >= IMAGE[1])[:, None] & (sinks & image).any(-1)
        gone = share if meaning == "paper" else 1 - share
        others = p * (image & ~sinks)
        new = torch.where(sinks, (1 - gone) * p, p)
        new = new + gone * (p * sinks).sum(-1, keepdim=True) * others / others.sum(-1, keepdim=True)
        return torch.where(mine[..., None] & (others.sum(-1, keepdim=True) > 0), new, p)

    return hand


@pytest.mark.parametrize(("meaning", "rho", "share"), [("paper", 0.3, 0.6), ("code", 0.7, 0.4), ("code", 0.5, 0.6)])
def test_redistribution_onto_a_span(llama: LanguageModel, meaning: Any, rho: float, share: float) -> None:
    ids, mask = tokens()
    tau, dimensions = 1.6, [0, 5, 9]
    copy, streams = eager_copy(llama.model), []
    for layer in copy.model.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: streams.append(args[0]), with_kwargs=True)
    with by_hand(visual(meaning, rho, share, tau, dimensions, streams)):
        expected = logits(copy, ids, mask)[mask.bool()]
    settings: dict[str, Any] = {"span": IMAGE, "dimensions": dimensions, "tau": tau, "layers": range(LAYERS)}
    edit = RedistributeSinks(**settings, rho=rho, share=share, least=0.1, meaning=meaning)
    with apply(llama, edit):
        found = logits(llama.model, ids, mask)[mask.bool()]
    scale = float(expected.abs().max())
    assert float((expected - logits(llama.model, ids, mask)[mask.bool()]).abs().max()) > 1e-3 * scale
    assert float((found - expected).abs().max()) <= 1e-5 * scale


def test_redistribution_in_chunks(llama: LanguageModel) -> None:
    ids, mask = tokens()
    settings: dict[str, Any] = {"span": IMAGE, "dimensions": (0, 5, 9), "tau": 1.6, "layers": range(LAYERS)}
    edit = RedistributeSinks(**settings, rho=0.3, least=0.1)
    with apply(llama, edit), prompt_boundary(LENGTH, padded=True):
        whole = logits(llama.model, ids, mask)[:, -1]
        cache, found = None, None
        for first, stop in ((0, 5), (5, 9), (9, LENGTH)):
            at_ = (mask.cumsum(-1) - 1).clamp(min=0)[:, first:stop]
            options = dict(attention_mask=mask[:, :stop], position_ids=at_, past_key_values=cache, use_cache=True)
            with torch.no_grad():
                output = llama.model(input_ids=ids[:, first:stop], **options)
            cache, found = output.past_key_values, output.logits[:, -1]
    assert found is not None and float((found - whole).abs().max()) <= 1e-5 * float(whole.abs().max())
